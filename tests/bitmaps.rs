//! Dirty bitmaps between hmpsh and stock QEMU: a guest that writes all the time takes them along, bit
//! by bit, on one image that both sides share. Answers are those of QMP.

mod common;

use common::disk::{DiskGuest, drive, goes_on};
use common::journey::goes_on_for;
use common::qmp::Qmp;
use common::vmm::Program::{Hmpsh, Qemu7, Qemu10};
use common::vmm::{Program, Setup, Vmm, have};
use serde_json::{Value, json};

/// A host and how to ask it about bitmaps.
struct Host {
    vm: Vmm,
    qmp: Option<Qmp>,
}

/// What there is to know about a bitmap: name, dirty bytes, granularity, and whether it is recording.
type Info = (String, u64, u64, bool);

impl Host {
    fn start(program: Program, setup: Setup) -> Self {
        if program == Hmpsh {
            let vm = setup.start();
            return Self { vm, qmp: None };
        }
        let place = tempfile::tempdir().unwrap();
        let socket = place.path().join("qmp");
        let option = format!("unix:{},server=on,wait=off", socket.display());
        let vm = setup.args(&["-qmp", &option]).start();
        let qmp = Some(Qmp::connect(&socket));
        Self { vm, qmp }
    }

    /// `verb` as in `block-dirty-bitmap-add`; without a text it has gone well.
    fn bitmap(&mut self, verb: &str, node: &str, name: &str, options: Value) -> String {
        let is_disabled = options["disabled"] == true;
        let granularity = options["granularity"].as_u64();
        let Some(qmp) = &mut self.qmp else {
            let flag = if is_disabled { "-d " } else { "" };
            let granularity = granularity.map_or(String::new(), |bytes| format!(" {bytes}"));
            let line = format!("block_dirty_bitmap_{verb} {flag}{node} {name}{granularity}");
            let said = self.vm.command(&line);
            let said = said.strip_prefix("Error: ").unwrap_or(&said);
            return said.trim_end().to_owned();
        };
        let mut arguments = options;
        arguments["node"] = json!(node);
        arguments["name"] = json!(name.trim_matches('"'));
        let answer = qmp.ask(&format!("block-dirty-bitmap-{verb}"), arguments);
        answer.err().unwrap_or_default()
    }

    fn bitmaps(&mut self) -> Vec<Info> {
        let mut infos: Vec<Info> = match &mut self.qmp {
            None => {
                let text = self.vm.command("info dirty-bitmaps");
                text.lines().map(parsed).collect()
            }
            Some(qmp) => {
                let blocks = qmp.run("query-block", json!({}));
                let all = blocks[0]["inserted"]["dirty-bitmaps"].as_array();
                let info = |bitmap: &Value| {
                    assert_eq!(bitmap["busy"], false, "{bitmap}");
                    (
                        bitmap["name"].as_str().unwrap().to_owned(),
                        bitmap["count"].as_u64().unwrap(),
                        bitmap["granularity"].as_u64().unwrap(),
                        bitmap["recording"].as_bool().unwrap(),
                    )
                };
                all.into_iter().flatten().map(info).collect()
            }
        };
        infos.sort();
        infos
    }

    /// A hash of the bits.
    fn sha256(&mut self, name: &str) -> Option<String> {
        let arguments = json!({"node": "d0", "name": name});
        let command = "x-debug-block-dirty-bitmap-sha256";
        let answer = self.qmp.as_mut()?.run(command, arguments);
        Some(answer["sha256"].as_str().unwrap().to_owned())
    }
}

/// A line of `info dirty-bitmaps`.
fn parsed(line: &str) -> Info {
    let mut words = line.split([' ', ',', ':']).filter(|word| !word.is_empty());
    let mut next = || words.next().unwrap_or_default();
    assert_eq!(next(), "d0", "{line}");
    let name = next().to_owned();
    let dirty = next().parse().unwrap();
    assert_eq!([next(), next(), next()], ["bytes", "dirty", "granularity"]);
    let granularity = next().parse().unwrap();
    let rest: Vec<&str> = words.collect();
    assert!(rest.is_empty() || rest == ["recording"], "{line}");
    (name, dirty, granularity, !rest.is_empty())
}

/// The guest is at rest at `from`: it goes to a new host, which is at rest, too.
fn moved(guest: &DiskGuest, from: &mut Host, program: Program) -> Host {
    let setup = guest.setup(program).args(&["-S"]);
    let mut to = Host::start(program, setup.incoming("tcp:127.0.0.1:0"));
    let port = to.vm.port();
    from.vm.quiet("migrate_set_capability dirty-bitmaps on");
    from.vm.command(&format!("migrate tcp:127.0.0.1:{port}"));
    from.vm.wait_migration("completed");
    from.vm.wait_status("paused (postmigrate)");
    to.vm.wait_status("paused");
    to
}

/// From host to host.
fn travel(programs: &[Program]) {
    if !have(programs) {
        return;
    }
    let guest = DiskGuest::new();
    let mut hosts = vec![Host::start(programs[0], guest.setup(programs[0]))];
    goes_on_for(&[&hosts[0].vm], 3);
    let first = &mut hosts[0];
    for (name, options) in [
        ("fine", json!({"granularity": 512})),
        ("plain", json!({})),
        ("off", json!({"granularity": 4096})),
        ("empty", json!({"granularity": 1024, "disabled": true})),
    ] {
        assert_eq!(first.bitmap("add", "d0", name, options), "");
    }
    goes_on(&[&first.vm]);
    assert_eq!(first.bitmap("disable", "d0", "off", json!({})), "");
    for program in &programs[1..] {
        let to = moved(&guest, hosts.last_mut().unwrap(), *program);
        hosts.push(to);
        let there = hosts.len() - 1;
        let (left, arrived) = (hosts[there - 1].bitmaps(), hosts[there].bitmaps());
        assert_eq!(left, arrived);
        let [empty, fine, off, plain] = &arrived[..] else {
            panic!("{arrived:?}");
        };
        assert_eq!(empty, &("empty".to_owned(), 0, 1024, false));
        assert_eq!((fine.2, fine.3, plain.2, plain.3), (512, true, 65536, true));
        assert!(
            fine.1 > 0 && plain.1 > 0 && off.1 > 0 && !off.3,
            "{arrived:?}"
        );
        // The guest writes to the first 64 KiB only.
        assert!(fine.1 <= 65536 && plain.1 == 65536, "{arrived:?}");
        // One is made new, so that each way has bits of its own.
        let to = &mut hosts[there];
        assert_eq!(to.bitmap("clear", "d0", "fine", json!({})), "");
        if to.qmp.is_some() {
            let options = json!({"granularity": 4096});
            assert_eq!(to.bitmap("add", "d0", "twin", options), "");
        }
        to.vm.quiet("cont");
        goes_on(&hosts.iter().map(|host| &host.vm).collect::<Vec<_>>());
        let to = &mut hosts[there];
        let off_now = to
            .bitmaps()
            .into_iter()
            .find(|info| info.0 == "off")
            .unwrap();
        assert_eq!(&off_now, off);
        to.vm.quiet("stop");
        // A QEMU's own, of the same writes, has the same bits.
        assert_eq!(to.sha256("off"), to.sha256("twin"));
        if to.qmp.is_some() {
            assert_eq!(to.bitmap("remove", "d0", "twin", json!({})), "");
        }
    }
}

#[test]
fn to_7_2_and_back() {
    travel(&[Hmpsh, Qemu7, Hmpsh]);
}

#[test]
fn from_10_0_and_back() {
    travel(&[Qemu10, Hmpsh, Qemu10]);
}

#[test]
fn between_hmpsh() {
    travel(&[Hmpsh, Hmpsh]);
}

/// The same lines, the same answers.
#[test]
fn answers_are_those_of_10_0() {
    if !have(&[Hmpsh, Qemu10]) {
        return;
    }
    let guest = DiskGuest::new();
    let answers = |program| -> (Vec<String>, Vec<Info>) {
        let mut host = Host::start(program, guest.setup(program).args(&["-S"]));
        let none = json!({});
        let long = "x".repeat(1024);
        let mut said = Vec::new();
        for (verb, node, name, options) in [
            ("add", "foo", "b0", &none),
            ("add", "foo", "\"\"", &none),
            ("add", "d0", "\"\"", &none),
            ("add", "d0", "b0", &json!({"granularity": 100})),
            ("add", "d0", "b0", &json!({"granularity": 256})),
            ("add", "d0", "b0", &json!({"granularity": 1u64 << 32})),
            ("add", "d0", &long, &none),
            ("add", "d0", "b0", &none),
            ("add", "d0", "b0", &none),
            (
                "add",
                "d0",
                "b1",
                &json!({"granularity": 1u64 << 31, "disabled": true}),
            ),
            ("add", "d0", "b2", &json!({"granularity": 512})),
            ("clear", "foo", "b0", &none),
            ("clear", "d0", "b9", &none),
            ("clear", "d0", "b0", &none),
            ("enable", "d0", "b1", &none),
            ("disable", "d0", "b0", &none),
            ("disable", "d0", "b9", &none),
            ("remove", "d0", "b9", &none),
            ("remove", "d0", "b2", &none),
        ] {
            said.push(host.bitmap(verb, node, name, options.clone()));
        }
        (said, host.bitmaps())
    };
    assert_eq!(answers(Hmpsh), answers(Qemu10));
}

/// A disk that the destination knows by another name: between two hmpsh the guest stays, and a QEMU's
/// guest comes without its bitmaps, which is said.
#[test]
fn bitmaps_without_a_disk_there() {
    if !have(&[Hmpsh, Qemu10]) {
        return;
    }
    let guest = DiskGuest::new();
    let other = drive("d9", guest.image.path(), "");
    for program in [Hmpsh, Qemu10] {
        let mut from = Host::start(program, guest.setup(program));
        goes_on_for(&[&from.vm], 3);
        assert_eq!(from.bitmap("add", "d0", "b0", json!({})), "");
        let setup = guest.setup_named(Hmpsh, "d9", &other).args(&["-S"]);
        let mut to = Host::start(Hmpsh, setup.incoming("tcp:127.0.0.1:0"));
        let port = to.vm.port();
        from.vm.quiet("migrate_set_capability dirty-bitmaps on");
        from.vm.command(&format!("migrate tcp:127.0.0.1:{port}"));
        if program == Hmpsh {
            let state = from.vm.wait_migration("failed");
            assert!(
                state.contains("Disk 'd0' exists only at the source"),
                "{state}"
            );
            from.vm.wait_status("running");
            goes_on_for(&[&from.vm], 3);
        } else {
            from.vm.wait_migration("completed");
            to.vm.wait_status("paused");
            let state = to.vm.command("info migrate");
            let why = "dirty bitmaps: lost (Cannot find device='d0' nor node-name='d0')\n";
            assert!(state.contains(why), "{state}");
        }
        assert!(to.bitmaps().is_empty());
        let left = from.bitmaps();
        assert_eq!((left.len(), left[0].3), (1, true));
    }
}
