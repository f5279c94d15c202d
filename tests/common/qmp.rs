//! A client of QEMU's QMP on a unix socket: one command, one answer.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::{Value, json};

use super::hmp::PATIENCE;
use super::poll;

/// A session in which commands may be given.
#[derive(Debug)]
pub(crate) struct Qmp(BufReader<UnixStream>);

impl Qmp {
    /// Connects to a socket that is there, or will be in a moment.
    pub(crate) fn connect(path: &Path) -> Self {
        let socket = poll(PATIENCE, || UnixStream::connect(path).ok()).expect("a QMP socket");
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut qmp = Self(BufReader::new(socket));
        assert!(qmp.read().get("QMP").is_some());
        qmp.run("qmp_capabilities", json!({}));
        qmp
    }

    /// Runs a command that does not fail, and returns what it returns.
    #[track_caller]
    pub(crate) fn run(&mut self, command: &str, arguments: Value) -> Value {
        let answer = self.ask(command, arguments);
        answer.unwrap_or_else(|error| panic!("{command}: {error}"))
    }

    /// Runs a command; `Err` with the text if it fails.
    pub(crate) fn ask(&mut self, command: &str, arguments: Value) -> Result<Value, String> {
        let line = json!({"execute": command, "arguments": arguments});
        writeln!(self.0.get_mut(), "{line}").expect("QMP takes input");
        loop {
            let mut answer = self.read();
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = answer.get("error") {
                return Err(error["desc"].as_str().unwrap_or_default().to_owned());
            }
        }
    }

    fn read(&mut self) -> Value {
        let mut line = String::new();
        self.0.read_line(&mut line).expect("QMP answers in time");
        serde_json::from_str(&line).expect("JSON")
    }
}
