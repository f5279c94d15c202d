//! Floor 6: the human monitor.
//!
//! One `table` (generated from commands.toml) drives parsing, dispatch, help, completion and the
//! manual page. A `session::Session` executes command lines and knows no terminal; the
//! `wire` puts one on a character device (pipe, file, socket) with a line editor that echoes as
//! QEMU's does, the `shell` on a terminal. QEMU: `monitor/hmp.c`, `util/readline.c`.

pub mod args;
pub mod commands;
pub mod complete;
pub mod conversation;
pub mod expr;
pub mod help;
pub mod hint;
pub mod history;
pub mod interpreter;
pub mod man;
pub mod progress;
pub mod readline;
pub mod registers;
pub mod script;
pub mod session;
pub mod shell;
pub mod table;
pub mod terminal;
pub mod wire;
