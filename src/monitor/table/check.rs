//! Reads commands.toml and refuses what is wrong with it, naming the row.
//!
//! Used twice: by build.rs, which generates the table from what this returns, and by the unit
//! tests. It never looks at handlers: the compiler does, when it meets them in the table.

use std::collections::BTreeSet;

use serde::Deserialize;

/// The whole of commands.toml, checked; rows sorted by name.
#[derive(Debug)]
pub(crate) struct Table {
    /// Commands.
    pub(crate) commands: Vec<Row>,
    /// Items of `info`.
    pub(crate) items: Vec<Row>,
    /// QEMU's commands that this version has not.
    pub(crate) not_built: Vec<String>,
    /// The same for items of `info`.
    pub(crate) not_built_items: Vec<String>,
}

/// One command or item.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Row {
    /// What is typed.
    pub(crate) name: String,
    /// Other names for it.
    #[serde(default)]
    pub(crate) aliases: Vec<String>,
    /// QEMU's args_type.
    #[serde(default)]
    pub(crate) args: String,
    /// Arguments as `help` shows them.
    #[serde(default)]
    pub(crate) params: String,
    /// What `help` says.
    pub(crate) help: String,
    /// What the manual page says besides.
    pub(crate) long: String,
    /// Function below `monitor::commands`.
    pub(crate) handler: String,
    /// Completion of the arguments that are not flags.
    #[serde(default)]
    pub(crate) completion: Vec<String>,
    /// Section of the manual page.
    pub(crate) group: String,
}

/// One argument of an args_type.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Argument {
    /// Its name.
    pub(crate) key: String,
    /// One of [`LETTERS`], or `-`.
    pub(crate) letter: char,
    /// The flag's own letter, for `-`.
    pub(crate) flag: Option<char>,
    /// Whether the flag takes a value.
    pub(crate) has_value: bool,
    /// `?`, `.` or a blank.
    pub(crate) suffix: char,
}

/// Reads and checks commands.toml.
pub(crate) fn read(text: &str) -> Result<Table, String> {
    let file: toml::Table = toml::from_str(text).map_err(|error| error.to_string())?;
    let mut table = Table {
        commands: vec![],
        items: vec![],
        not_built: vec![],
        not_built_items: vec![],
    };
    for (key, value) in file {
        match key.as_str() {
            "command" => table.commands = rows("command", value)?,
            "info" => table.items = rows("info item", value)?,
            "not-built" => table.not_built = names(&key, value)?,
            "not-built-info" => table.not_built_items = names(&key, value)?,
            _ => return Err(format!("unknown key '{key}'")),
        }
    }
    check_names("command", &table.commands, &table.not_built)?;
    check_names("info item", &table.items, &table.not_built_items)?;
    Ok(table)
}

/// Splits an args_type into its arguments.
pub(crate) fn arguments(spec: &str) -> Result<Vec<Argument>, String> {
    let mut arguments: Vec<Argument> = Vec::new();
    for part in spec.split(',').filter(|_| !spec.is_empty()) {
        let argument = argument(part).ok_or_else(|| format!("illegal args '{part}'"))?;
        if arguments.iter().any(|known| known.key == argument.key) {
            return Err(format!("duplicate argument '{}'", argument.key));
        }
        if argument.flag.is_some() && arguments.iter().any(|known| known.flag == argument.flag) {
            return Err(format!("duplicate flag in '{part}'"));
        }
        if let Some(last) = arguments.last() {
            let can_follow = match last.suffix {
                '?' => argument.suffix == '?',
                _ => last.letter != 'S',
            };
            if !can_follow {
                return Err(format!("'{part}' can not follow '{}'", last.key));
            }
        }
        arguments.push(argument);
    }
    Ok(arguments)
}

fn argument(part: &str) -> Option<Argument> {
    let (key, kind) = part.split_once(':')?;
    if key.is_empty() {
        return None;
    }
    let mut letters = kind.chars();
    let letter = letters.next()?;
    let key = key.to_owned();
    if letter == '-' {
        let flag = letters.next().filter(char::is_ascii_alphabetic)?;
        let has_value = match letters.as_str() {
            "" => false,
            "s" => true,
            _ => return None,
        };
        return Some(Argument {
            key,
            letter,
            flag: Some(flag),
            has_value,
            suffix: ' ',
        });
    }
    let suffix = match letters.as_str() {
        "" => ' ',
        "?" if letter != '/' && letter != 'b' => '?',
        "." if letter == 'i' => '.',
        _ => return None,
    };
    LETTERS.contains(letter).then_some(Argument {
        key,
        letter,
        flag: None,
        has_value: false,
        suffix,
    })
}

fn rows(what: &str, value: toml::Value) -> Result<Vec<Row>, String> {
    let toml::Value::Array(values) = value else {
        return Err(format!("'{what}' is not a list of rows"));
    };
    let mut rows = Vec::new();
    for (index, value) in values.into_iter().enumerate() {
        let name = value.get("name").and_then(toml::Value::as_str).map_or_else(
            || format!("{what} number {}", index + 1),
            |name| format!("{what} '{name}'"),
        );
        let row: Row = value
            .try_into()
            .map_err(|error: toml::de::Error| format!("{name}: {}", error.message()))?;
        check(&row).map_err(|problem| format!("{name}: {problem}"))?;
        rows.push(row);
    }
    rows.sort_by(|one: &Row, other: &Row| one.name.cmp(&other.name));
    Ok(rows)
}

fn check(row: &Row) -> Result<(), String> {
    for (key, value) in [
        ("name", &row.name),
        ("help", &row.help),
        ("long", &row.long),
        ("group", &row.group),
    ] {
        if value.trim().is_empty() {
            return Err(format!("missing {key}"));
        }
    }
    if std::iter::once(&row.name)
        .chain(&row.aliases)
        .any(|name| name.is_empty() || name.contains(|c: char| c.is_whitespace() || c == '/'))
    {
        return Err("a name can not be empty or hold blanks or '/'".to_owned());
    }
    let arguments = arguments(&row.args)?;
    if arguments.is_empty() != row.params.is_empty() {
        return Err("args and params must both be given, or neither".to_owned());
    }
    let is_path = row.handler.split("::").all(|word| {
        word.starts_with(|c: char| c.is_ascii_lowercase())
            && word
                .chars()
                .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
    });
    if !is_path {
        return Err(format!("illegal handler '{}'", row.handler));
    }
    if let Some(unknown) = row
        .completion
        .iter()
        .find(|name| !COMPLETIONS.contains(&name.as_str()))
    {
        return Err(format!("unknown completion '{unknown}'"));
    }
    let places = arguments
        .iter()
        .filter(|argument| argument.flag.is_none())
        .count();
    if row.completion.len() > places {
        return Err(format!("more completions than arguments ({places})"));
    }
    Ok(())
}

fn check_names(what: &str, rows: &[Row], not_built: &[String]) -> Result<(), String> {
    if rows.is_empty() {
        return Err(format!("there is no {what}"));
    }
    let mut seen = BTreeSet::new();
    for row in rows {
        for name in std::iter::once(&row.name).chain(&row.aliases) {
            if !seen.insert(name) {
                return Err(format!("{what} '{}': duplicate name '{name}'", row.name));
            }
        }
    }
    match not_built.iter().find(|name| !seen.insert(name)) {
        Some(name) => Err(format!(
            "{what} '{name}' is listed as not built and appears twice"
        )),
        None => Ok(()),
    }
}

fn names(key: &str, value: toml::Value) -> Result<Vec<String>, String> {
    let mut names: Vec<String> = value
        .try_into()
        .map_err(|error: toml::de::Error| format!("{key}: {}", error.message()))?;
    names.sort();
    Ok(names)
}

/// Argument letters; `-` stands for flags and is not among them.
const LETTERS: &str = "FBsSilMoTb/";

/// Names a `completion` list may hold; `monitor::table::Completion` has a variant for each.
pub(crate) const COMPLETIONS: [&str; 14] = [
    "none",
    "command",
    "item",
    "file",
    "uri",
    "capability",
    "on-off",
    "parameter",
    "parameter-value",
    "chardev",
    "ringbuf",
    "drive",
    "snapshot",
    "log-item",
];

#[cfg(test)]
mod tests {
    use super::*;

    const ROW: &str = "[[command]]\nname='a'\nhelp='h'\nlong='l'\nhandler='x::y'\ngroup='g'\n";
    const ITEM: &str = "[[info]]\nname='i'\nhelp='h'\nlong='l'\nhandler='x::y'\ngroup='g'\n";

    fn refusal(text: &str) -> String {
        read(text).expect_err("the table is wrong")
    }

    #[test]
    fn accepts_a_minimal_table() {
        let table = read(&format!("{ROW}{ITEM}")).expect("a good table");
        assert_eq!((table.commands.len(), table.items.len()), (1, 1));
    }

    #[test]
    fn names_the_row_and_the_problem() {
        let with = |extra: &str| refusal(&format!("{ROW}{extra}\n{ITEM}"));
        assert!(with("colour='red'").starts_with("command 'a': unknown field `colour`"));
        assert_eq!(
            with("args='v:q'\nparams='v'"),
            "command 'a': illegal args 'v:q'"
        );
        assert_eq!(
            with("args='v:i'"),
            "command 'a': args and params must both be given, or neither"
        );
        assert_eq!(
            with("args='v:s?,w:s'\nparams='v'"),
            "command 'a': 'w:s' can not follow 'v'"
        );
        assert_eq!(
            with("args='v:S,w:s'\nparams='v'"),
            "command 'a': 'w:s' can not follow 'v'"
        );
        assert_eq!(
            with("args='v:-f,w:-f'\nparams='v'"),
            "command 'a': duplicate flag in 'w:-f'"
        );
        assert_eq!(
            with("args='v:i,v:i'\nparams='v'"),
            "command 'a': duplicate argument 'v'"
        );
        assert_eq!(
            with("completion=['moon']"),
            "command 'a': unknown completion 'moon'"
        );
        assert_eq!(
            with("completion=['file']"),
            "command 'a': more completions than arguments (0)"
        );
        assert_eq!(with("aliases=['a']"), "command 'a': duplicate name 'a'");
        assert_eq!(
            with("aliases=['b c']"),
            "command 'a': a name can not be empty or hold blanks or '/'"
        );
        assert_eq!(
            refusal(&format!("{ROW}{ROW}{ITEM}")),
            "command 'a': duplicate name 'a'"
        );
        assert_eq!(
            refusal(&format!("sound=1\n{ROW}{ITEM}")),
            "unknown key 'sound'"
        );
        assert_eq!(
            refusal(&format!("not-built=['a']\n{ROW}{ITEM}")),
            "command 'a' is listed as not built and appears twice"
        );
        assert_eq!(refusal(ROW), "there is no info item");
        let edited = |from: &str, to: &str| refusal(&format!("{}{ITEM}", ROW.replace(from, to)));
        assert_eq!(
            edited("help='h'\n", "help=''\n"),
            "command 'a': missing help"
        );
        assert_eq!(
            edited("help='h'\n", ""),
            "command 'a': missing field `help`"
        );
        assert_eq!(
            edited("name='a'\n", ""),
            "command number 1: missing field `name`"
        );
        assert_eq!(edited("x::y", "x:Y"), "command 'a': illegal handler 'x:Y'");
    }

    #[test]
    fn splits_every_letter() {
        let spec = "a:-d,b:-fs,c:/,d:i,e:i.,f:l?";
        let letters: Vec<_> = arguments(spec)
            .expect("legal")
            .iter()
            .map(|a| (a.letter, a.suffix))
            .collect();
        assert_eq!(
            letters,
            [
                ('-', ' '),
                ('-', ' '),
                ('/', ' '),
                ('i', ' '),
                ('i', '.'),
                ('l', '?')
            ]
        );
        assert!(arguments("a").is_err());
        assert!(arguments("a:s!").is_err());
        assert!(arguments("a:-dx").is_err());
        assert!(arguments("a:s.").is_err());
    }
}
