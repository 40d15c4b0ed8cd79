//! A connection that can be disturbed: a TCP proxy between example and broker.

use std::net::SocketAddr;

use anyhow::Result;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
    task::JoinSet,
};

/// Forwards until told otherwise. Dropped, it ends with its connections.
pub struct Proxy {
    address: SocketAddr,
    state: watch::Sender<State>,
    _tasks: JoinSet<()>,
}

/// In one place, so that no connection sees a half of [`Proxy::cut`].
#[derive(Clone, Copy, Default)]
struct State {
    frozen: bool,
    cuts: u64,
}

impl Proxy {
    /// Listens on a port of its own and forwards to this `host:port`.
    ///
    /// # Errors
    ///
    /// If there is no port to listen on.
    pub async fn start(target: &str) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let state = watch::Sender::new(State::default());
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(listener, target.to_owned(), state.subscribe()));
        Ok(Self {
            address,
            state,
            _tasks: tasks,
        })
    }

    /// Where it listens, `host:port`.
    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// From now on, what clients send is dropped; they are not told. What the
    /// server sends still reaches them.
    pub fn freeze(&self) {
        self.state.send_modify(|state| state.frozen = true);
    }

    /// Ends all connections, and forwards those that come after.
    pub fn cut(&self) {
        self.state.send_modify(|state| {
            state.frozen = false;
            state.cuts += 1;
        });
    }
}

async fn accept(
    listener: TcpListener,
    target: String,
    state: watch::Receiver<State>,
) {
    let mut connections = JoinSet::new();
    while let Ok((client, _peer)) = listener.accept().await {
        let (state, target) = (state.clone(), target.clone());
        connections.spawn(serve(client, target, state));
    }
}

async fn serve(client: TcpStream, target: String, state: watch::Receiver<State>) {
    let born = state.borrow().cuts;
    // Without a server the client's connection ends, as it should.
    let Ok(server) = TcpStream::connect(target).await else {
        return;
    };
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let mut cut = state.clone();
    // Once bytes are missing, the rest of the connection makes no sense.
    let mut dropping = false;
    let mut drops = move || {
        let now = *state.borrow();
        dropping |= now.frozen || now.cuts != born;
        dropping
    };
    tokio::select! {
        _cut = cut.wait_for(|now| now.cuts != born) => {}
        () = forward(from_client, to_server, &mut drops) => {}
        () = forward(from_server, to_client, || false) => {}
    }
}

async fn forward(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut drops: impl FnMut() -> bool,
) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        if !drops() && to.write_all(&buffer[..count]).await.is_err() {
            break;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wait::DEADLINE;
    use tokio::time::timeout;

    #[tokio::test]
    async fn it_forwards_then_drops_then_cuts_then_forwards_again() -> Result<()> {
        let server = TcpListener::bind("127.0.0.1:0").await?;
        let proxy = Proxy::start(&server.local_addr()?.to_string()).await?;
        let mut client = TcpStream::connect(proxy.address()).await?;
        let (mut served, _peer) = timeout(DEADLINE, server.accept()).await??;
        let mut word = [0; 4];

        client.write_all(b"ping").await?;
        timeout(DEADLINE, served.read_exact(&mut word)).await??;
        assert_eq!(&word, b"ping");

        proxy.freeze();
        client.write_all(b"lost").await?;
        served.write_all(b"push").await?;
        timeout(DEADLINE, client.read_exact(&mut word)).await??;
        assert_eq!(&word, b"push");

        proxy.cut();
        let mut rest = Vec::new();
        // The end may be a reset; what matters is that nothing was passed on.
        let _end = timeout(DEADLINE, served.read_to_end(&mut rest)).await?;
        assert_eq!(rest, b"");

        let mut client = TcpStream::connect(proxy.address()).await?;
        let (mut served, _peer) = timeout(DEADLINE, server.accept()).await??;
        client.write_all(b"back").await?;
        timeout(DEADLINE, served.read_exact(&mut word)).await??;
        assert_eq!(&word, b"back");
        Ok(())
    }
}
