//! Generates the monitor's command table from commands.toml, after checking it.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::{env, fs};

#[path = "src/monitor/table/check.rs"]
mod check;

use check::{Argument, Row, Table};

fn main() -> Result<(), String> {
    println!("cargo::rerun-if-changed=commands.toml");
    println!("cargo::rerun-if-changed=src/monitor/table/check.rs");
    let text =
        fs::read_to_string("commands.toml").map_err(|error| format!("commands.toml: {error}"))?;
    let source = check::read(&text)
        .and_then(|table| generate(&table))
        .map_err(|problem| format!("commands.toml: {problem}"))?;
    let out = env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?;
    let path = PathBuf::from(out).join("commands.rs");
    fs::write(&path, source).map_err(|error| format!("{}: {error}", path.display()))
}

fn generate(table: &Table) -> Result<String, String> {
    let mut text = String::new();
    list(
        &mut text,
        "Every command, sorted by name.",
        "COMMANDS",
        &table.commands,
    )?;
    list(
        &mut text,
        "Every item of `info`, sorted by name.",
        "ITEMS",
        &table.items,
    )?;
    for (name, names) in [
        ("NOT_BUILT", &table.not_built),
        ("NOT_BUILT_ITEMS", &table.not_built_items),
    ] {
        line(
            &mut text,
            &format!("pub(super) static {name}: &[&str] = &{names:?};"),
        );
    }
    Ok(text)
}

fn list(text: &mut String, doc: &str, name: &str, rows: &[Row]) -> Result<(), String> {
    line(
        text,
        &format!("/// {doc}\npub static {name}: &[Command] = &["),
    );
    for row in rows {
        let args: Vec<String> = check::arguments(&row.args)?
            .iter()
            .map(argument)
            .collect::<Result<_, _>>()?;
        let completion: Vec<String> = row
            .completion
            .iter()
            .map(|name| format!("Completion::{}", camel(name)))
            .collect();
        let items = if row.name == "info" && name == "COMMANDS" {
            "ITEMS"
        } else {
            "&[]"
        };
        line(
            text,
            &format!(
                "Command {{ name: {:?}, aliases: &{:?}, args: &[{}], params: {:?}, help: {:?}, \
                 long: {:?}, handler: commands::{}, completion: &[{}], group: {:?}, items: {items} }},",
                row.name,
                row.aliases,
                args.join(", "),
                row.params,
                row.help,
                row.long,
                row.handler,
                completion.join(", "),
                row.group,
            ),
        );
    }
    line(text, "];");
    Ok(())
}

fn argument(argument: &Argument) -> Result<String, String> {
    let kind = match (argument.letter, argument.flag) {
        ('F', _) => "File".to_owned(),
        ('B', _) => "Block".to_owned(),
        ('s', _) => "Word".to_owned(),
        ('S', _) => "Rest".to_owned(),
        ('i', _) => "Int32".to_owned(),
        ('l', _) => "Int64".to_owned(),
        ('M', _) => "Mebibytes".to_owned(),
        ('o', _) => "Size".to_owned(),
        ('T', _) => "Seconds".to_owned(),
        ('b', _) => "OnOff".to_owned(),
        ('/', _) => "Format".to_owned(),
        ('-', Some(flag)) if argument.has_value => format!("FlagValue({flag:?})"),
        ('-', Some(flag)) => format!("Flag({flag:?})"),
        (letter, _) => return Err(format!("no kind for letter '{letter}'")),
    };
    let presence = match argument.suffix {
        '?' => "Optional",
        '.' => "AfterDot",
        _ => "Required",
    };
    Ok(format!(
        "Arg {{ key: {:?}, kind: Kind::{kind}, presence: Presence::{presence} }}",
        argument.key
    ))
}

/// `on-off` to `OnOff`.
fn camel(name: &str) -> String {
    name.split('-')
        .map(|word| {
            let (first, rest) = word.split_at(1);
            first.to_uppercase() + rest
        })
        .collect()
}

fn line(text: &mut String, line: &str) {
    // Writing to a String can not fail.
    let _ = writeln!(text, "{line}");
}
