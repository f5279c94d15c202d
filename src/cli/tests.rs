//! Command lines and what they mean; the sentences were said by a real QEMU where it has them.

use super::*;
use crate::config::{
    Accel, BackendKind, Boot, ChardevConfig, ChardevKind, Incoming, Interface, MonitorConfig,
};

fn request(line: &str) -> Result<Request, Error> {
    parse(line.split_whitespace().map(OsString::from))
}

pub(super) fn config(line: &str) -> Config {
    match request(line) {
        Ok(Request::Run(config)) => *config,
        other => panic!("{line}: {other:?}"),
    }
}

pub(super) fn refusal(line: &str) -> String {
    match request(line) {
        Err(error) => error.to_string(),
        other => panic!("{line}: {other:?}"),
    }
}

fn chardev(id: &str, kind: ChardevKind) -> ChardevConfig {
    ChardevConfig {
        id: id.to_owned(),
        kind,
    }
}

fn kind(line: &str) -> ChardevKind {
    let config = config(&format!("-monitor none {line}"));
    assert_eq!(config.chardevs.len(), 1, "{line}");
    config.chardevs[0].kind.clone()
}

#[test]
fn nothing_means_the_defaults() {
    let config = config("");
    assert_eq!(config.machine.accel, None);
    assert_eq!(config.machine.cpu, "qemu64");
    assert_eq!(config.machine.memory, 128 << 20);
    assert_eq!(config.machine.vcpus, 1);
    assert_eq!(config.machine.boot, Boot::Builtin);
    assert_eq!(config.machine.serial.as_deref(), Some("serial0"));
    assert_eq!(
        config.chardevs,
        [
            chardev("serial0", ChardevKind::Ringbuf { size: 65536 }),
            chardev("compat_monitor0", ChardevKind::Stdio),
        ]
    );
    assert_eq!(
        config.monitors,
        [MonitorConfig {
            chardev: "compat_monitor0".into()
        }]
    );
    assert_eq!(config.prompt, "(qemu) ");
    assert!(!config.start_paused && !config.daemonize && config.incoming.is_none());
}

#[test]
fn machine_options_reach_the_machine() {
    for line in [
        "-M microvm,acpi=off,pic=on,pit=auto,rtc=off,isa-serial=on,kernel-irqchip=split",
        "--machine type=microvm,acpi=off,kernel-irqchip=split,auto-kernel-cmdline=on",
        "-M microvm",
    ] {
        assert_eq!(config(line).machine, config("").machine, "{line}");
    }
    let chips = config("-M microvm,kernel-irqchip=on").machine.chips;
    assert!(chips.irqchip_on);
    let machine = config("-M microvm,auto-kernel-cmdline=off").machine;
    assert!(!machine.auto_kernel_cmdline);
    let chips = config("-M microvm,pic=off,rtc=on").machine.chips;
    assert!(!chips.pic && chips.pit && chips.rtc);
    let chips = config("-M microvm,pit=off,rtc=auto").machine.chips;
    assert!(chips.pic && !chips.pit && !chips.rtc);
    let machine = config(
        "-M microvm,accel=none -cpu host -m 1.5G -smp cpus=4 \
                          -uuid 00112233-4455-6677-8899-aabbccddeeff -append window=64M",
    )
    .machine;
    assert_eq!(machine.accel, Some(Accel::None));
    assert_eq!(machine.cpu, "host");
    assert_eq!(machine.memory, 3 << 29);
    assert_eq!(machine.vcpus, 4);
    assert_eq!(machine.uuid.unwrap()[15], 0xff);
    assert_eq!(machine.append, "window=64M");
    assert_eq!(config("-m 0").machine.memory, 128 << 20);
    assert_eq!(config("-m 1k").machine.memory, 8192);
    assert_eq!(config("-enable-kvm").machine.accel, Some(Accel::Kvm));
    assert_eq!(config("-M microvm,isa-serial=off").machine.serial, None);
    assert_eq!(config("-bios fw").machine.boot, Boot::Bios("fw".into()));
    assert_eq!(
        config("-kernel k -initrd i -append x").machine.boot,
        Boot::Kernel {
            kernel: "k".into(),
            initrd: Some("i".into())
        }
    );
}

#[test]
fn slots_are_legacy_unless_they_are_told() {
    for (line, interface) in [
        ("", Interface::Legacy),
        ("-global virtio-mmio.force-legacy=false", Interface::Modern),
        ("-global virtio-mmio.force-legacy=off", Interface::Modern),
        (
            "-global driver=virtio-mmio,property=force-legacy,value=n",
            Interface::Modern,
        ),
        (
            "-global virtio-mmio.force-legacy=no -global virtio-mmio.force-legacy=yes \
             -global virtio-mmio.ioeventfd=on",
            Interface::Legacy,
        ),
    ] {
        let config = config(line);
        assert_eq!(config.machine.interface, interface, "{line}");
        assert!(config.globals.is_empty());
    }
}

#[test]
fn memory_backends_back_the_memory() {
    let line = "-object memory-backend-memfd,id=mem,size=64M -M microvm,memory-backend=mem";
    let machine = config(line).machine;
    assert_eq!(machine.memory, 64 << 20);
    let backend = machine.memory_backend.unwrap();
    assert_eq!(
        (backend.id.as_str(), backend.kind, backend.share),
        ("mem", BackendKind::Memfd, true)
    );
    let file = "-object memory-backend-file,id=f,size=1G,mem-path=/x,share=on \
                -M microvm,memory-backend=f -m 1G";
    assert_eq!(
        config(file).machine.memory_backend.unwrap().kind,
        BackendKind::File("/x".into())
    );
    assert_eq!(
        refusal(&format!("{line} -m 1G")),
        "Machine memory size does not match the size of the memory backend"
    );
    assert_eq!(
        refusal("-M microvm,memory-backend=no"),
        "Memory backend 'no' not found"
    );
}

#[test]
fn short_forms_name_every_device() {
    assert_eq!(kind("-serial null"), ChardevKind::Null);
    assert_eq!(kind("-serial stdio"), ChardevKind::Stdio);
    assert_eq!(kind("-serial pty"), ChardevKind::Pty);
    assert_eq!(
        kind("-serial ringbuf"),
        ChardevKind::Ringbuf { size: 65536 }
    );
    assert_eq!(kind("-serial file:/a,b"), ChardevKind::File("/a,b".into()));
    let unix = |server, wait| ChardevKind::Unix {
        path: "/s".into(),
        server,
        wait,
    };
    assert_eq!(kind("-serial unix:/s"), unix(false, false));
    assert_eq!(kind("-serial unix:/s,server"), unix(true, true));
    assert_eq!(kind("-serial unix:/s,server,nowait"), unix(true, false));
    assert_eq!(
        kind("-serial unix:/s,server=on,wait=off"),
        unix(true, false)
    );
    let tcp = |host: &str, server, wait| ChardevKind::Tcp {
        host: host.into(),
        port: "4555".into(),
        server,
        wait,
    };
    assert_eq!(kind("-serial tcp:h:4555"), tcp("h", false, false));
    assert_eq!(
        kind("-serial tcp::4555,server,nowait"),
        tcp("", true, false)
    );
    assert_eq!(
        kind("-serial tcp:[::1]:4555,server=on"),
        tcp("::1", true, true)
    );
    let none = config("-monitor none -serial none");
    assert!(none.chardevs.is_empty() && none.machine.serial.is_none() && none.monitors.is_empty());
}

#[test]
fn long_forms_name_every_device() {
    let kind = |text: &str| {
        config(&format!("-nodefaults -chardev {text},id=x")).chardevs[0]
            .kind
            .clone()
    };
    assert_eq!(kind("null"), ChardevKind::Null);
    assert_eq!(kind("file,path=/a"), ChardevKind::File("/a".into()));
    assert_eq!(kind("ringbuf,size=1k"), ChardevKind::Ringbuf { size: 1024 });
    assert_eq!(kind("memory"), ChardevKind::Ringbuf { size: 65536 });
    assert_eq!(
        kind("socket,path=/s,server=on,wait=off"),
        ChardevKind::Unix {
            path: "/s".into(),
            server: true,
            wait: false
        }
    );
    assert_eq!(
        kind("socket,host=h,port=1,server=on,nodelay=on"),
        ChardevKind::Tcp {
            host: "h".into(),
            port: "1".into(),
            server: true,
            wait: true
        }
    );
}

#[test]
fn monitors_and_ports_find_their_devices() {
    let line = "-chardev null,id=m -mon chardev=m,mode=readline -chardev null,id=s \
                -serial chardev:s -monitor unix:/a,server,nowait -monitor null";
    let config = config(line);
    let monitors: Vec<&str> = config
        .monitors
        .iter()
        .map(|monitor| monitor.chardev.as_str())
        .collect();
    assert_eq!(monitors, ["m", "compat_monitor1", "compat_monitor2"]);
    assert_eq!(config.machine.serial.as_deref(), Some("s"));
    let bare = super::tests::config("-nodefaults");
    assert!(bare.chardevs.is_empty() && bare.monitors.is_empty());
    let batch = super::tests::config("-e quit");
    assert!(batch.monitors.is_empty() && batch.commands == ["quit"]);
    assert!(super::tests::config("-daemonize").monitors.is_empty());
}

#[test]
fn the_rest_reaches_the_config() {
    let config = config(
        "-name guest=vm,debug-threads=on -S -no-reboot -pidfile /p -D /log -d migration,vm \
         -trace monitor_* -incoming tcp:0:4444 -global migration.x-return-path=off \
         -global driver=hmpsh,property=exit-on-error,value=on -script /f -prompt hm> \
         -display none -nographic -no-user-config -sandbox off",
    );
    assert_eq!(config.name.as_deref(), Some("vm"));
    assert!(config.start_paused && config.no_reboot);
    assert_eq!(config.pidfile, Some("/p".into()));
    assert_eq!(config.log_file, Some("/log".into()));
    assert_eq!(config.log_items, ["migration", "vm", "monitor"]);
    assert_eq!(config.incoming, Some(Incoming::Uri("tcp:0:4444".into())));
    assert_eq!(config.globals.len(), 2);
    assert_eq!(config.globals[1].name, "exit-on-error");
    assert_eq!(config.script, Some("/f".into()));
    assert_eq!(config.prompt, "hm>");
    assert_eq!(
        super::tests::config("-incoming defer").incoming,
        Some(Incoming::Defer)
    );
}

#[test]
fn what_only_prints_wins_at_once() {
    let text = |line: &str| match request(line) {
        Ok(Request::Print(text)) => text,
        other => panic!("{other:?}"),
    };
    assert!(text("-version").starts_with("hmpsh version "));
    assert!(text("-S --help").contains("-incoming URI|defer"));
    assert!(text("-M help").contains("microvm"));
    assert!(text("-cpu help").contains("qemu64"));
    assert!(matches!(request("demo"), Ok(Request::Demo)));
}

#[test]
fn bad_options_are_named_in_qemus_words() {
    const SIZE: &str = "Parameter 'size' expects a non-negative number below 2^64\n\
        Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n\
        and exabytes, respectively.";
    for (line, text) in [
        ("-foo", "invalid option"),
        ("-m", "requires an argument"),
        ("--m", "requires an argument"),
        ("-S=1", "invalid option"),
        (
            "-M foo",
            "unsupported machine type: \"foo\"\nUse -machine help to list supported machines",
        ),
        (
            "-M none",
            "unsupported machine type: \"none\"\nUse -machine help to list supported machines",
        ),
        (
            "-M microvm,foo=on",
            "Property 'microvm-machine.foo' not found",
        ),
        ("-M microvm,acpi", "Expected '=' after parameter 'acpi'"),
        ("-M microvm,,acpi=off", "Invalid parameter ''"),
        (
            "-M microvm,pic=maybe",
            "Parameter 'pic' does not accept value 'maybe'",
        ),
        (
            "-M microvm,isa-serial=maybe",
            "Parameter 'isa-serial' expects 'on' or 'off'",
        ),
        (
            "-M microvm,kernel-irqchip=x",
            "Parameter 'kernel-irqchip' does not accept value 'x'",
        ),
        ("-accel foo", "invalid accelerator foo"),
        ("-accel kvm,foo=1", "Property 'kvm-accel.foo' not found"),
        ("-cpu foo", "unable to find CPU model 'foo'"),
        ("-m foo", SIZE),
        ("--m 12x", SIZE),
        ("-m size=", SIZE),
        ("-m -5", "Value '-5' is out of range for parameter 'size'"),
        ("-m size=64M,foo=1", "Invalid parameter 'foo'"),
        ("-smp foo", "Parameter 'smp.cpus' expects integer"),
        (
            "-smp 0",
            "Invalid CPU topology: CPU topology parameters must be greater than zero",
        ),
        (
            "-smp 17",
            "Invalid SMP CPUs 17. The max CPUs supported by machine 'microvm' is 16",
        ),
        (
            "-smp -1",
            "Invalid SMP CPUs -1. The max CPUs supported by machine 'microvm' is 16",
        ),
        ("-smp 2,foo=1", "Parameter 'smp.foo' is unexpected"),
        ("-uuid foo", "failed to parse UUID string: wrong format"),
        ("-name foo,bar=1", "Invalid parameter 'bar'"),
        ("-serial foo", "'foo' is not a valid char driver"),
        ("-serial null:x", "'null:x' is not a valid char driver"),
        ("-serial unix:", "invalid Unix socket address"),
        ("-serial tcp:foo", "error parsing address 'foo'"),
        ("-serial tcp:h:1,server,foo=1", "Invalid parameter 'foo'"),
        (
            "-serial unix:/s,server=maybe",
            "Parameter 'server' expects 'on' or 'off'",
        ),
        (
            "-serial chardev:nope",
            "could not connect serial device to character backend 'chardev:nope'",
        ),
        ("-monitor foo", "'foo' is not a valid char driver"),
        ("-monitor chardev:zz", "chardev \"zz\" not found"),
        ("-chardev foo,id=x", "'foo' is not a valid char driver name"),
        ("-chardev null", "chardev: no id specified"),
        ("-chardev null,id=x,bar=1", "Invalid parameter 'bar'"),
        ("-chardev file,id=x", "chardev: file: no filename given"),
        (
            "-chardev socket,id=x,host=b",
            "chardev: socket: no port given",
        ),
        (
            "-chardev socket,id=x,path=/a,host=b",
            "None or one of 'path', 'fd' or 'host' option required.",
        ),
        (
            "-chardev null,id=1a",
            "Parameter 'id' expects an identifier\n\
             Identifiers consist of letters, digits, '-', '.', '_', starting with a letter.",
        ),
        (
            "-chardev ringbuf,id=m,size=1000",
            "size of ringbuf chardev must be power of two",
        ),
        ("-mon chardev=nope", "chardev \"nope\" not found"),
        ("-mon mode=readline", "Parameter 'chardev' is missing"),
        ("-mon m,foo=1", "Invalid parameter 'foo'"),
        (
            "-mon m,mode=foo",
            "Parameter 'mode' does not accept value 'foo'",
        ),
        (
            "-object foo,id=x",
            "Parameter 'qom-type' does not accept value 'foo'",
        ),
        (
            "-object memory-backend-ram,id=x",
            "Parameter 'size' is missing",
        ),
        (
            "-object memory-backend-ram,size=1M",
            "Parameter 'id' is missing",
        ),
        ("-object id=x", "Parameter 'qom-type' is missing"),
        (
            "-object memory-backend-file,id=x,size=1M",
            "Parameter 'mem-path' is missing",
        ),
        (
            "-object memory-backend-ram,id=x,size=foo",
            "Parameter 'size' expects a size value",
        ),
        (
            "-object memory-backend-ram,id=x,size=0",
            "property 'size' of memory-backend-ram doesn't take value '0'",
        ),
        (
            "-object memory-backend-ram,id=x,size=1M,foo=1",
            "Invalid parameter 'foo'",
        ),
        (
            "-object memory-backend-ram,id=x,size=1M,share=maybe",
            "Parameter 'share' expects 'on' or 'off'",
        ),
        ("-incoming foo:bar", "unknown migration protocol: foo:bar"),
        ("-incoming tcp:foo", "error parsing address 'foo'"),
        (
            "-global migration.foo=1",
            "can't apply global migration.foo=1: Property 'migration.foo' not found",
        ),
        ("-global foo", "Invalid parameter 'foo'"),
        (
            "-global virtio-mmio.force-legacy=True",
            "can't apply global virtio-mmio.force-legacy=True: Parameter 'force-legacy' expects \
             'on' or 'off'",
        ),
        (
            "-global virtio-mmio.force_legacy=off",
            "can't apply global virtio-mmio.force_legacy=off: Property 'virtio-mmio.force_legacy' \
             not found",
        ),
        (
            "-display foo",
            "Parameter 'type' does not accept value 'foo'",
        ),
        ("-display none,foo=1", "Parameter 'foo' is unexpected"),
        ("-sandbox foo", "Parameter 'enable' expects 'on' or 'off'"),
    ] {
        assert_eq!(refusal(line), format!("{line}: {text}"));
    }
    assert_eq!(
        refusal("-chardev null,id=x -chardev null,id=x"),
        "-chardev null,id=x: Duplicate ID 'x' for chardev"
    );
    assert_eq!(
        refusal("-chardev null,id=x -mon x -mon chardev=x"),
        "-mon chardev=x: chardev 'x' is already in use"
    );
    assert_eq!(
        refusal("-append x -bios b"),
        "-append only allowed with -kernel option"
    );
    assert_eq!(
        refusal("-initrd x"),
        "-initrd only allowed with -kernel option"
    );
    assert_eq!(
        refusal("-serial stdio"),
        "cannot use stdio by multiple character devices"
    );
}

#[test]
fn what_is_not_built_is_refused_by_name() {
    for (line, what) in [
        ("-blockdev driver=raw", "-blockdev"),
        ("--netdev user,id=n", "--netdev"),
        ("-qmp stdio", "-qmp"),
        ("-blockdev x", "-blockdev"),
        ("-fw_cfg x", "-fw_cfg"),
        ("inspect file", "inspect"),
        ("disk.img", "disk.img: disk images"),
        ("-M microvm,acpi=on", "-M microvm,acpi=on: acpi=on"),
        (
            "-M microvm,kernel-irqchip=off",
            "-M microvm,kernel-irqchip=off: kernel-irqchip=off",
        ),
        ("-M microvm,pcie=on", "-M microvm,pcie=on: pcie=on"),
        ("-accel tcg", "-accel tcg: tcg"),
        (
            "-cpu host,+x2apic",
            "-cpu host,+x2apic: CPU features '+x2apic'",
        ),
        ("-m 1G,maxmem=2G", "-m 1G,maxmem=2G: maxmem=2G"),
        ("-smp 2,cores=2", "-smp 2,cores=2: cores=2"),
        ("-serial mon:stdio", "-serial mon:stdio: mon"),
        (
            "-serial telnet:h:1,server",
            "-serial telnet:h:1,server: telnet",
        ),
        ("-serial vc", "-serial vc: vc"),
        ("-chardev udp,id=x", "-chardev udp,id=x: udp"),
        (
            "-chardev stdio,id=x,signal=off",
            "-chardev stdio,id=x,signal=off: signal=off",
        ),
        ("-mon m,mode=control", "-mon m,mode=control: mode=control"),
        (
            "-object tls-creds-x509,id=t",
            "-object tls-creds-x509,id=t: tls-creds-x509",
        ),
        (
            "-object memory-backend-ram,id=x,size=1M,prealloc=on",
            "-object memory-backend-ram,id=x,size=1M,prealloc=on: prealloc=on",
        ),
        ("-incoming rdma:h:1", "-incoming rdma:h:1: rdma"),
        ("-global kvm-pit.x=1", "-global kvm-pit.x=1: kvm-pit"),
        (
            "-global virtio-mmio.ioeventfd=no",
            "-global virtio-mmio.ioeventfd=no: virtio-mmio.ioeventfd=no",
        ),
        ("-name x,process=y", "-name x,process=y: process=y"),
        ("-bios b -kernel k", "-bios with -kernel"),
        (
            "-serial null -serial null",
            "-serial: more than one serial port",
        ),
        ("-display gtk", "-display gtk: gtk"),
    ] {
        assert_eq!(
            refusal(line),
            format!("{what}: not built in this version"),
            "{line}"
        );
    }
}

#[test]
fn every_row_has_what_its_readers_need() {
    for row in OPTIONS {
        assert!(!row.help.is_empty() && !row.names.is_empty());
        for name in row.names {
            assert!(!foreign::OPTIONS.contains(name), "{name} is built");
            assert_eq!(
                OPTIONS
                    .iter()
                    .filter(|other| other.names.contains(name))
                    .count(),
                1
            );
        }
    }
}

#[test]
fn a_path_that_is_not_utf8_is_refused() {
    use std::os::unix::ffi::OsStringExt;
    let words = [
        OsString::from("-bios"),
        OsString::from_vec(vec![b'x', 0xff]),
    ];
    assert_eq!(
        parse(words).unwrap_err().to_string(),
        "x\u{fffd}: is not UTF-8"
    );
}

proptest::proptest! {
    #[test]
    fn any_words_are_answered(
        place in 0..OPTIONS.len(),
        value in "[a-z0-9:=,./-]{0,24}",
        odd in ".{0,12}",
    ) {
        let word = format!("-{}", OPTIONS[place].names[0]);
        let _ = parse([word.clone(), value].map(OsString::from));
        let _ = parse([word, odd.clone()].map(OsString::from));
        let _ = parse([odd].map(OsString::from));
    }
}
