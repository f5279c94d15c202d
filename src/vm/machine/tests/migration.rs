//! Device state out of one machine and into another.

use super::*;
use crate::vm::guest::{SavedSection, SectionHeader};

/// Copies all memory and all devices.
fn moved(from: &Machine, to: &Machine) -> Result<(), Error> {
    for (from, to) in from.ram().iter().zip(to.ram()) {
        let mut bytes = [0; PAGE_SIZE];
        from.populated(|run| {
            for page in run {
                from.page(page).read(&mut bytes);
                to.page(page).write(&bytes);
            }
        })
        .unwrap();
    }
    loaded(to, &from.save_devices()?)
}

fn loaded(to: &Machine, sections: &[SavedSection]) -> Result<(), Error> {
    let mut loader = to.loader();
    for section in sections {
        let mut body = &section.body[..];
        loader.load(&section.header, &mut body)?;
        assert!(body.is_empty(), "{}", section.header.idstr);
    }
    assert_eq!(loader.missing(), Vec::<String>::new());
    loader.apply()
}

fn header(idstr: &str, instance: u32, version: u32) -> SectionHeader {
    SectionHeader {
        idstr: idstr.to_owned(),
        instance,
        version,
    }
}

#[test]
fn a_guest_goes_on_in_another_machine() {
    if !has_kvm() {
        return;
    }
    for cpu in ["qemu64", "host"] {
        let bios = image(COUNTER);
        let config = MachineConfig {
            vcpus: 2,
            cpu: cpu.to_owned(),
            ..config(bios.path().to_owned())
        };
        let mut bench = Bench::new(&config, false);
        bench.machine.start().unwrap();
        bench.wire.wait(|text| text.starts_with("A.."));
        for _ in 0..5 {
            bench.machine.stop(RunState::FinishMigrate).unwrap();
            let next = Bench::new(&config, true);
            assert_eq!(next.machine.run_state(), RunState::InMigrate);
            moved(&bench.machine, &next.machine).unwrap();
            assert_eq!(next.counter(), bench.counter());
            let (old, new) = (
                bench.machine.registers(0).unwrap(),
                next.machine.registers(0).unwrap(),
            );
            assert_eq!(new.regs, old.regs);
            assert_eq!(new.sregs, old.sregs);
            next.machine.start().unwrap();
            next.wire.wait_for_more(2);
            assert!(
                !next.wire.text().contains(['A', 'F']),
                "{}",
                next.wire.text()
            );
            assert!(next.counter() > bench.counter());
            bench = next;
        }
    }
}

#[test]
fn the_builtin_guest_moves_with_two_vcpus_and_memory_above_four_gib() {
    if !has_kvm() {
        return;
    }
    let config = MachineConfig {
        boot: Boot::Builtin,
        vcpus: 2,
        memory: (3 << 30) + (64 << 20),
        append: "window=2M base=4G rate=5000 smp=2".to_owned(),
        ..config(PathBuf::new())
    };
    let beacons = |bench: &Bench, count| {
        bench.wire.wait(|text| {
            assert!(!text.contains("FAULT"), "{text}");
            text.matches("B ").count() >= count
        });
    };
    let mut bench = Bench::new(&config, false);
    bench.machine.start().unwrap();
    beacons(&bench, 3);
    for _ in 0..4 {
        bench.machine.stop(RunState::FinishMigrate).unwrap();
        let next = Bench::new(&config, true);
        moved(&bench.machine, &next.machine).unwrap();
        next.machine.start().unwrap();
        beacons(&next, 3);
        bench = next;
    }
    // Long mode: both ways to translate agree.
    bench.machine.stop(RunState::Paused).unwrap();
    let rip = bench.machine.registers(0).unwrap().regs.rip;
    let physical = bench
        .machine
        .virtual_memory(0)
        .unwrap()
        .translate(rip)
        .unwrap();
    assert!(bench.machine.host_address(physical).is_some());
    assert_eq!(
        bench
            .machine
            .virtual_memory(0)
            .unwrap()
            .translate(0x7fff_ffff_f000),
        None
    );
}

#[test]
fn what_is_saved_is_described() {
    if !has_kvm() {
        return;
    }
    let bios = image(COUNTER);
    let bench = Bench::new(&config(bios.path().to_owned()), false);
    bench.machine.start().unwrap();
    bench.wire.wait(|text| text.starts_with("A."));
    assert!(
        bench.machine.save_devices().is_err(),
        "a running guest has no state to save"
    );
    bench.machine.stop(RunState::Paused).unwrap();
    let sections = bench.machine.save_devices().unwrap();
    let headers: Vec<_> = sections
        .iter()
        .map(|section| section.header.clone())
        .collect();
    assert_eq!(headers, bench.machine.sections());
    for section in &sections {
        assert_eq!(
            interop::described_size(&section.description),
            section.body.len() as u64,
            "{}",
            section.header.idstr
        );
    }
}

#[test]
fn a_machine_without_kvm_forwards_a_guest_unchanged() {
    if !has_kvm() {
        return;
    }
    let bios = image(COUNTER);
    let with_kvm = MachineConfig {
        vcpus: 2,
        ..config(bios.path().to_owned())
    };
    let without = MachineConfig {
        accel: Some(WantedAccel::None),
        ..with_kvm.clone()
    };
    let first = Bench::new(&with_kvm, false);
    first.machine.start().unwrap();
    first.wire.wait(|text| text.starts_with("A.."));
    first.machine.stop(RunState::FinishMigrate).unwrap();
    let second = Bench::new(&without, true);
    moved(&first.machine, &second.machine).unwrap();
    let (sent, kept) = (
        first.machine.save_devices().unwrap(),
        second.machine.save_devices().unwrap(),
    );
    for (sent, kept) in sent.iter().zip(&kept) {
        // Another vCPU's time stamp counter went on between the two.
        if sent.header.idstr != "cpu" {
            assert_eq!(sent.body, kept.body, "{}", sent.header.idstr);
        }
        assert_eq!(sent.description, kept.description);
    }
    let third = Bench::new(&with_kvm, true);
    moved(&second.machine, &third.machine).unwrap();
    third.machine.start().unwrap();
    third.wire.wait_for_more(2);
    assert!(!third.wire.text().contains(['A', 'F']));
}

#[test]
fn unknown_sections_and_versions_are_refused_in_qemus_words() {
    let bios = image(COUNTER);
    let config = MachineConfig {
        accel: Some(WantedAccel::None),
        chips: EVERY_CHIP,
        ..config(bios.path().to_owned())
    };
    let bench = Bench::new(&config, true);
    let mut loader = bench.machine.loader();
    assert_eq!(
        loader.missing(),
        [
            "cpu 0",
            "apic 0",
            "ioapic 0",
            "kvmclock 0",
            "i8259 0",
            "i8259 1",
            "i8254 0",
            "mc146818rtc 0",
            "serial 0"
        ]
        .map(str::to_owned)
    );
    let zeros = vec![0; 4096];
    let mut refused = |header: SectionHeader| {
        loader
            .load(&header, &mut &zeros[..])
            .unwrap_err()
            .to_string()
    };
    for (idstr, instance, advice) in [
        ("hpet", 0, ""),
        ("cpu", 1, " (give both sides the same -smp)"),
        ("cpu_common", 1, " (give both sides the same -smp)"),
        ("ioapic", 1, " (start QEMU with -M microvm,acpi=off)"),
        ("acpi-ged", 0, " (start QEMU with -M microvm,acpi=off)"),
        ("PCIHost", 0, " (start QEMU with -M microvm,pcie=off)"),
        ("slirp", 0, " (start QEMU with -nic none)"),
    ] {
        assert_eq!(
            refused(header(idstr, instance, 1)),
            format!(
                "Unknown savevm section or instance '{idstr}' {instance}. Make sure that your \
                 current VM setup matches your saved VM setup, including any hotplugged \
                 devices{advice}"
            )
        );
    }
    assert_eq!(
        refused(header("cpu", 0, 13)),
        "savevm: unsupported version 13 for 'cpu' v12"
    );
    assert_eq!(
        refused(header("timer", 0, 3)),
        "savevm: unsupported version 3 for 'timer' v2"
    );
    assert_eq!(
        refused(header("ioapic", 0, 1)),
        "error while loading state for instance 0x0 of device 'ioapic': ioapic: incoming \
         version_id 1 is too old for local minimum version_id  3"
    );
    assert!(refused(header("cpu", 0, 12)).contains("env.xcr0"));
}

#[test]
fn a_serial_section_needs_a_serial_port() {
    let bios = image(COUNTER);
    let config = MachineConfig {
        accel: Some(WantedAccel::None),
        ..config(bios.path().to_owned())
    };
    let machine = Machine::new(&config, None, Arc::new(|_| ()), true).unwrap();
    assert!(
        machine
            .sections()
            .iter()
            .all(|header| header.idstr != "serial")
    );
    let body = [0, 0x0c, 0, 0, 1, 0, 8, 0x60, 0xb0, 0, 0];
    let error = machine
        .loader()
        .load(&header("serial", 0, 3), &mut &body[..])
        .unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("Unknown savevm section or instance 'serial' 0.")
    );
}

#[test]
fn what_kvm_refuses_is_named_and_nothing_runs() {
    if !has_kvm() {
        return;
    }
    let bios = image(COUNTER);
    let config = config(bios.path().to_owned());
    let bench = Bench::new(&config, false);
    let mut sections = bench.machine.save_devices().unwrap();
    // CR4, every reserved bit set.
    sections[0].body[480..488].fill(0xff);
    let next = Bench::new(&config, true);
    let error = loaded(&next.machine, &sections).unwrap_err().to_string();
    assert!(
        error.contains("KVM_SET_SREGS") && error.contains("cr4 0xffffffffffffffff"),
        "{error}"
    );
    assert_eq!(next.machine.run_state(), RunState::InMigrate);
}
