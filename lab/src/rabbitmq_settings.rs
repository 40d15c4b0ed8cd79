//! The settings of a RabbitMQ for one lesson: a configuration file as a reader
//! would mount it into a container, beside the settings that the server has anyway.

use std::path::Path;

/// Where the official image has its configuration; the files that a
/// configuration names, `certs/ca.pem` or `definitions.json`, are below it.
pub const CONTAINER_FOLDER: &str = "/etc/rabbitmq";

/// Where the configuration itself goes in a container.
pub const CONTAINER_CONFIG: &str = "/etc/rabbitmq/conf.d/20-lesson.conf";

/// The plugins: users by certificate, and the management API.
pub const PLUGINS: &str = "[rabbitmq_auth_mechanism_ssl,rabbitmq_management].\n";

/// The port of the configuration for TLS.
pub const TLS_PORT: u16 = 5671;

/// The name of the file with users, vhosts and permissions.
pub const DEFINITIONS: &str = "definitions.json";

/// The text of a configuration, and of the definitions that it loads.
#[derive(Clone, Debug)]
pub struct RabbitMqSettings {
    pub config: String,
    pub definitions: Option<String>,
}

impl RabbitMqSettings {
    /// Does it listen for TLS, on [`TLS_PORT`]?
    pub fn has_tls(&self) -> bool {
        self.config.contains(&tls_listener())
    }

    /// The value for the environment variable that the examples read, given the
    /// ports under which this machine reaches the server.
    pub fn address(&self, plain: u16, tls: u16) -> String {
        if self.has_tls() {
            format!("amqps://localhost:{tls}/%2f")
        } else {
            format!("amqp://localhost:{plain}/%2f")
        }
    }

    /// The configuration for a process of this machine, whose files are in `home`.
    pub fn native(&self, home: &Path, tls: u16) -> String {
        let folder = format!("{CONTAINER_FOLDER}/");
        let home = format!("{}/", home.display());
        self.config.replace(&folder, &home).replace(
            &tls_listener(),
            &format!("listeners.ssl.default = 127.0.0.1:{tls}"),
        )
    }
}

fn tls_listener() -> String {
    format!("listeners.ssl.default = {TLS_PORT}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_native_server_has_its_own_folder_and_port() {
        let settings = RabbitMqSettings {
            config: "listeners.ssl.default = 5671\n\
                     ssl_options.cacertfile = /etc/rabbitmq/certs/ca.pem\n"
                .to_owned(),
            definitions: None,
        };
        assert_eq!(
            settings.native(Path::new("/data"), 1234),
            "listeners.ssl.default = 127.0.0.1:1234\n\
             ssl_options.cacertfile = /data/certs/ca.pem\n"
        );
        assert_eq!(settings.address(1, 2), "amqps://localhost:2/%2f");
    }

    #[test]
    fn without_tls_the_plain_port_is_the_address() {
        let settings = RabbitMqSettings {
            config: "loopback_users = none\n".to_owned(),
            definitions: None,
        };
        assert_eq!(settings.address(1, 2), "amqp://localhost:1/%2f");
    }
}
