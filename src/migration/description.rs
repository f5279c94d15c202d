//! The trailing JSON: names and lengths of all fields, so that tools can read a stream offline.
//!
//! ```text
//! 06 | length be32 | {"configuration": {…}, "page_size": 4096, "devices": [{…}…], ours}
//! ```
//! Head and order as QEMU 10.0 writes them (7.2 has no `configuration`; no reader minds). Our key
//! comes last (`docs/wire.md`). QEMU: `qemu_savevm_state_vmdesc`.

use serde_json::{Value, json};

use super::integrity::Seal;
use super::section::VMDESCRIPTION;
use crate::vm::guest::SavedSection;
use crate::vm::memory::PAGE_SIZE;

/// Appends the record for a stream with these FULL sections.
pub fn put(machine: &str, sections: &[SavedSection], seal: &Seal, to: &mut Vec<u8>) {
    let text = text(machine, sections, seal);
    to.push(VMDESCRIPTION);
    to.extend((text.len() as u32).to_be_bytes());
    to.extend(text.as_bytes());
}

fn text(machine: &str, sections: &[SavedSection], seal: &Seal) -> String {
    let head = json!({
        "vmsd_name": "configuration",
        "version": 1,
        "fields": [
            {"name": "len", "type": "uint32", "size": 4},
            {"name": "name", "type": "buffer", "size": machine.len()},
        ],
    });
    let mut text = String::from("{\"configuration\": ");
    put_value(&head, &mut text);
    text.push_str(&format!(", \"page_size\": {PAGE_SIZE}, \"devices\": ["));
    for (index, section) in sections.iter().enumerate() {
        let mut device = json!({
            "name": section.header.idstr,
            "instance_id": section.header.instance,
        });
        if let (Value::Object(device), Value::Object(members)) = (&mut device, &section.description)
        {
            device.extend(members.clone());
        }
        text.push_str(if index == 0 { "" } else { ", " });
        put_value(&device, &mut text);
    }
    text.push_str("], ");
    text.push_str(&seal.member());
    text.push('}');
    text
}

/// Writes a value in one line with QEMU's separators, `, ` and `: `.
fn put_value(value: &Value, to: &mut String) {
    match value {
        Value::Object(members) => {
            to.push('{');
            for (index, (name, member)) in members.iter().enumerate() {
                to.push_str(if index == 0 { "" } else { ", " });
                to.push_str(&Value::from(name.as_str()).to_string());
                to.push_str(": ");
                put_value(member, to);
            }
            to.push('}');
        }
        Value::Array(items) => {
            to.push('[');
            for (index, item) in items.iter().enumerate() {
                to.push_str(if index == 0 { "" } else { ", " });
                put_value(item, to);
            }
            to.push(']');
        }
        plain => to.push_str(&plain.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::globalstate;
    use crate::migration::integrity::Sealing;
    use crate::vm::run_state::RunState;

    #[test]
    fn the_text_is_shaped_as_qemus() {
        let seal = Seal {
            stream: 1,
            ram: 2,
            marks: vec![3, 4],
        };
        let text = text("microvm", &[globalstate::save(RunState::Running)], &seal);
        assert_eq!(
            text,
            "{\"configuration\": {\"vmsd_name\": \"configuration\", \"version\": 1, \"fields\": \
             [{\"name\": \"len\", \"type\": \"uint32\", \"size\": 4}, {\"name\": \"name\", \
             \"type\": \"buffer\", \"size\": 7}]}, \"page_size\": 4096, \"devices\": [{\"name\": \
             \"globalstate\", \"instance_id\": 0, \"vmsd_name\": \"globalstate\", \"version\": 1, \
             \"fields\": [{\"name\": \"size\", \"type\": \"uint32\", \"size\": 4}, {\"name\": \
             \"runstate\", \"type\": \"buffer\", \"size\": 100}]}], \"hmpsh-integrity\": \
             {\"version\": 1, \"stream\": \"0000000000000001\", \"ram\": \"0000000000000002\", \
             \"marks\": \"0000000300000004\"}}"
        );
        assert!(serde_json::from_str::<Value>(&text).is_ok());
        assert_eq!(Seal::find(text.as_bytes()), Sealing::Sealed(seal));
    }
}
