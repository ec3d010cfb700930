//! The daemon's entry point.

#![warn(clippy::print_stdout, clippy::print_stderr)]

use std::process::ExitCode;

use vhost_user_blkmq::cli::{self, Invocation};
use vhost_user_blkmq::error::StartError;
use vhost_user_blkmq::logging;
use vhost_user_blkmq::logging::fatal;
use vhost_user_blkmq::server;

fn main() -> ExitCode {
    fatal::abort_on_panic();
    let code = match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            logging::print(&format!("vhost-user-blkmq: {error}\n"));
            error.exit_code()
        }
    };
    logging::settle(logging::PATIENCE);
    code
}

fn run() -> Result<(), StartError> {
    let arguments = match cli::parse(std::env::args_os())? {
        Invocation::Print(text) => {
            logging::print_out(text);
            return Ok(());
        }
        Invocation::Serve(arguments) => arguments,
    };
    let config = arguments.resolve()?;
    logging::init(config.log);
    server::run(config)
}
