//! The daemon's entry point.

use std::io::{self, Write};
use std::process::ExitCode;

use vhost_user_blkmq::cli::{self, Invocation};
use vhost_user_blkmq::config::Config;
use vhost_user_blkmq::daemon::server;
use vhost_user_blkmq::error::StartError;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vhost-user-blkmq: {error}");
            error.exit_code()
        }
    }
}

fn run() -> Result<(), StartError> {
    let arguments = match cli::parse(std::env::args_os())? {
        Invocation::Print(text) => {
            // Whoever asked may have gone: that is no error of ours.
            let _ = io::stdout().write_all(text.as_bytes());
            return Ok(());
        }
        Invocation::Serve(arguments) => arguments,
    };
    let config = Config::from_arguments(*arguments)?;
    env_logger::Builder::new()
        .filter_level(config.log)
        .format_target(false)
        .init();
    server::run(config)
}
