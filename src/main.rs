//! argv to [`Config`](hmpsh::config::Config), run it, and say how it went; the only place that
//! decides the exit status.

use std::process::ExitCode;

use hmpsh::cli::{self, Request, daemon};
use hmpsh::{demo, logger, program};

fn main() -> ExitCode {
    logger::install();
    match cli::parse(std::env::args_os().skip(1)) {
        Ok(Request::Run(config)) if config.daemonize && !daemon::is_child() => {
            match daemon::start(std::env::args_os().skip(1)) {
                Ok(None) => ExitCode::SUCCESS,
                // The child has said why on the stderr it shares with us.
                Ok(Some(_)) => ExitCode::FAILURE,
                Err(error) => fail(&format!("Failed to start in the background: {error}")),
            }
        }
        Ok(Request::Run(config)) => match program::run(*config) {
            Ok(status) => ExitCode::from(status),
            Err(error) => fail(&error),
        },
        Ok(Request::Print(text)) => {
            use std::io::Write;
            // A closed pipe behind `hmpsh -help | head` is no failure.
            let _ = std::io::stdout().write_all(text.as_bytes());
            ExitCode::SUCCESS
        }
        Ok(Request::Demo) => match demo::run(&mut std::io::stdout().lock()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&format!("demo: {error}")),
        },
        Err(error) => fail(&error),
    }
}

fn fail(error: &dyn std::fmt::Display) -> ExitCode {
    // One line, also where QEMU's sentence comes on several.
    eprintln!("hmpsh: {}", error.to_string().replace('\n', " "));
    ExitCode::FAILURE
}
