use proptest::prelude::*;
use serde_json::json;

use super::*;

#[derive(Clone, Debug, Default, PartialEq)]
struct Inner {
    a: u16,
    b: i32,
}

impl VmState for Inner {
    const NAME: &'static str = "inner";
    const VERSION: u32 = 1;

    fn fields(&mut self, v: &mut dyn Visitor, _version: u32) -> Result {
        v.number("a", &mut self.a)?;
        v.number("b", &mut self.b)
    }
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Outer {
    flag: bool,
    level: u8,
    table: [u64; 3],
    inner: Inner,
    many: [Inner; 2],
    when: i64,
    late: u32,
    extra: u64,
    more: u8,
}

impl VmState for Outer {
    const NAME: &'static str = "outer";
    const VERSION: u32 = 3;
    const MINIMUM: u32 = 2;
    const SUBSECTIONS: &'static [Subsection<Self>] = &[
        Subsection {
            name: "outer/extra",
            version: 1,
            needed: |s| s.extra != 0,
            fields: |s, v| v.number("extra", &mut s.extra),
        },
        Subsection {
            name: "outer/more",
            version: 2,
            needed: |s| s.more != 0,
            fields: |s, v| v.number("more", &mut s.more),
        },
    ];

    fn fields(&mut self, v: &mut dyn Visitor, version: u32) -> Result {
        v.number("flag", &mut self.flag)?;
        v.ranged("level", &mut self.level, 0..=9)?;
        v.unused(3)?;
        v.array("table", &mut self.table)?;
        v.state("inner", &mut self.inner)?;
        v.states("many", &mut self.many)?;
        v.timer("when", &mut self.when)?;
        if version >= 3 {
            v.number("late", &mut self.late)?;
        }
        Ok(())
    }

    fn loaded(&mut self) -> std::result::Result<(), String> {
        if self.flag && self.level == 0 {
            return Err("flag without level".to_owned());
        }
        Ok(())
    }
}

fn inners() -> impl Strategy<Value = Inner> {
    (any::<u16>(), any::<i32>()).prop_map(|(a, b)| Inner { a, b })
}

fn outers() -> impl Strategy<Value = Outer> {
    let plain = (
        any::<bool>(),
        1..=9u8,
        any::<[u64; 3]>(),
        inners(),
        [inners(), inners()],
    );
    let rest = (
        any::<i64>(),
        any::<u32>(),
        prop_oneof![Just(0), any::<u64>()],
        any::<u8>(),
    );
    (plain, rest).prop_map(
        |((flag, level, table, inner, many), (when, late, extra, more))| Outer {
            flag,
            level,
            table,
            inner,
            many,
            when,
            late,
            extra,
            more,
        },
    )
}

/// Bytes that a description says a section has.
fn described_size(object: &Value) -> u64 {
    let fields = object["fields"].as_array().unwrap().iter();
    let plain: u64 = fields
        .map(|f| f["size"].as_u64().unwrap() * f["array_len"].as_u64().unwrap_or(1))
        .sum();
    let subsections = object["subsections"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    let optional: u64 = subsections
        .iter()
        .map(|s| 6 + s["vmsd_name"].as_str().unwrap().len() as u64 + described_size(s))
        .sum();
    plain + optional
}

proptest! {
    #[test]
    fn what_was_saved_loads(mut state in outers()) {
        let bytes = save(&mut state).unwrap();
        prop_assert_eq!(described_size(&describe(&mut state).unwrap()), bytes.len() as u64);
        let mut again = Outer::default();
        let mut rest = &bytes[..];
        load(&mut again, 3, &mut rest).unwrap();
        prop_assert!(rest.is_empty());
        prop_assert_eq!(again, state);
    }

    #[test]
    fn a_short_body_is_an_error(mut state in outers()) {
        let bytes = save(&mut state).unwrap();
        // A cut right behind the plain fields, or behind a whole subsection, leaves a whole body:
        // what is missing is the footer, and the caller says so.
        let plain = save(&mut Outer { extra: 0, more: 0, ..state.clone() }).unwrap().len();
        let first = plain + if state.extra == 0 { 0 } else { 6 + "outer/extra".len() + 8 };
        for cut in 0..bytes.len() {
            let result = load(&mut Outer::default(), 3, &mut &bytes[..cut]);
            prop_assert_eq!(result.is_ok(), cut == plain || cut == first, "cut at {}", cut);
        }
    }

    #[test]
    fn any_bytes_load_or_fail(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = load(&mut Outer::default(), 3, &mut &bytes[..]);
    }
}

#[test]
fn a_value_outside_its_range_is_named() {
    let mut bytes = save(&mut Outer::default()).unwrap();
    bytes[1] = 10;
    let error = load(&mut Outer::default(), 3, &mut &bytes[..]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "outer: field 'level' is 0xa, legal is 0x0 to 0x9"
    );
    bytes[1] = 0;
    bytes[0] = 2;
    let error = load(&mut Outer::default(), 3, &mut &bytes[..]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "outer: field 'flag' is 0x2, legal is 0x0 to 0x1"
    );
    bytes[0] = 1;
    let error = load(&mut Outer::default(), 3, &mut &bytes[..]).unwrap_err();
    assert_eq!(error.to_string(), "outer: flag without level");
}

#[test]
fn the_path_to_a_nested_field_is_named() {
    let bytes = save(&mut Outer::default()).unwrap();
    let error = load(&mut Outer::default(), 3, &mut &bytes[..30]).unwrap_err();
    assert!(
        error.to_string().starts_with("outer.inner: field 'a': "),
        "{error}"
    );
}

#[test]
fn versions_are_held() {
    let mut state = Outer {
        late: 7,
        ..Outer::default()
    };
    let bytes = save(&mut state).unwrap();
    let mut old = Outer::default();
    load(&mut old, 2, &mut &bytes[..bytes.len() - 4]).unwrap();
    assert_eq!(old, Outer::default());
    assert_eq!(
        load(&mut old, 4, &mut &bytes[..]).unwrap_err().to_string(),
        "outer: incoming version_id 4 is too new for local version_id 3"
    );
    assert_eq!(
        load(&mut old, 1, &mut &bytes[..]).unwrap_err().to_string(),
        "outer: incoming version_id 1 is too old for local minimum version_id  2"
    );
}

#[test]
fn subsections_come_in_any_order() {
    let state = Outer {
        extra: 5,
        more: 6,
        ..Outer::default()
    };
    let bytes = save(&mut state.clone()).unwrap();
    let plain = save(&mut Outer::default()).unwrap().len();
    let split = plain + 6 + "outer/extra".len() + 8;
    let turned = [&bytes[..plain], &bytes[split..], &bytes[plain..split]].concat();
    let mut again = Outer::default();
    load(&mut again, 3, &mut &turned[..]).unwrap();
    assert_eq!(again, state);
}

#[test]
fn a_foreign_subsection_is_left_alone_and_an_unknown_one_refused() {
    let mut bytes = save(&mut Outer::default()).unwrap();
    let plain = bytes.len();
    bytes.extend_from_slice(b"\x05\x07other/x\0\0\0\x01");
    let mut from = &bytes[..];
    load(&mut Outer::default(), 3, &mut from).unwrap();
    assert_eq!(from.len(), bytes.len() - plain);

    bytes.truncate(plain);
    bytes.extend_from_slice(b"\x05\x07outer/x\0\0\0\x01");
    let error = load(&mut Outer::default(), 3, &mut &bytes[..]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "VM subsection 'outer/x' in 'outer' does not exist"
    );
}

#[test]
fn the_description_has_qemus_shape() {
    let mut state = Outer {
        extra: 1,
        ..Outer::default()
    };
    let inner = json!({"vmsd_name": "inner", "version": 1, "fields": [
        {"name": "a", "type": "uint16", "size": 2}, {"name": "b", "type": "int32", "size": 4}]});
    let expected = json!({"vmsd_name": "outer", "version": 3, "fields": [
        {"name": "flag", "type": "bool", "size": 1},
        {"name": "level", "type": "uint8", "size": 1},
        {"name": "unused", "type": "unused_buffer", "size": 3},
        {"name": "table", "array_len": 3, "type": "uint64", "size": 8},
        {"name": "inner", "type": "struct", "struct": inner, "size": 6},
        {"name": "many", "array_len": 2, "type": "struct", "struct": inner, "size": 6},
        {"name": "when", "type": "timer", "size": 8},
        {"name": "late", "type": "uint32", "size": 4}],
        "subsections": [{"vmsd_name": "outer/extra", "version": 1,
            "fields": [{"name": "extra", "type": "uint64", "size": 8}]}]});
    let text = describe(&mut state).unwrap().to_string();
    assert_eq!(text, expected.to_string(), "members in QEMU's order too");
}
