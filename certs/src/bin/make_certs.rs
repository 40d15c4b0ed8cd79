//! `cargo run --bin make_certs -- DIR`: certificates for one's own experiments.

use std::{env, path::Path, process::ExitCode};

use certs::Certificates;

fn main() -> ExitCode {
    let args: Vec<_> = env::args_os().skip(1).collect();
    let [folder] = args.as_slice() else {
        eprintln!("usage: cargo run --bin make_certs -- DIR");
        return ExitCode::from(2);
    };
    let folder = Path::new(folder);
    match Certificates::make().and_then(|made| made.write(folder)) {
        Ok(()) => {
            println!("certificates and keys are in {}", folder.display());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
