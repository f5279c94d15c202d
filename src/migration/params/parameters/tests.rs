//! Every answer here was given by a real QEMU (10.0.2; 7.2.22 for names only it has).

use super::*;

const NO_SIZE: &str = "expects a non-negative number below 2^64\n\
    Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n\
    and exabytes, respectively.";

fn refusal(name: &str, value: &str) -> String {
    let mut parameters = Parameters::default();
    let error = parameters
        .set(name, value)
        .expect_err(&format!("{name} {value}"));
    assert_eq!(
        parameters.0,
        Parameters::default().0,
        "{name} {value} changed something"
    );
    error.to_string()
}

fn shown(name: &str, value: &str) -> String {
    let mut parameters = Parameters::default();
    parameters.set(name, value).unwrap();
    parameters
        .list()
        .into_iter()
        .find(|listing| listing.name == name)
        .unwrap()
        .value
}

#[test]
fn defaults_are_listed_as_qemu_lists_them() {
    let listed: Vec<String> = Parameters::default()
        .list()
        .into_iter()
        .filter(|listing| listing.is_listed)
        .map(|listing| format!("{}: {}", listing.name, listing.value))
        .collect();
    assert_eq!(listed.join("\n"), LISTING);
}

/// 10.0's list, with 7.2's own names where 7.2 has them.
const LISTING: &str = "\
announce-initial: 50 ms
announce-max: 550 ms
announce-rounds: 5
announce-step: 100 ms
compress-level: 1
compress-threads: 8
compress-wait-thread: on
decompress-threads: 2
throttle-trigger-threshold: 50
cpu-throttle-initial: 20
cpu-throttle-increment: 10
cpu-throttle-tailslow: off
max-cpu-throttle: 99
tls-creds: ''
tls-hostname: ''
max-bandwidth: 134217728 bytes/second
avail-switchover-bandwidth: 0 bytes/second
downtime-limit: 300 ms
x-checkpoint-delay: 20000 ms
block-incremental: off
multifd-channels: 2
multifd-compression: none
zero-page-detection: multifd
xbzrle-cache-size: 67108864 bytes
max-postcopy-bandwidth: 0
tls-authz: ''
x-vcpu-dirty-limit-period: 1000 ms
vcpu-dirty-limit: 1 MB/s
mode: normal
direct-io: off";

#[test]
fn good_values_are_kept_with_their_unit() {
    for (name, value, expected) in [
        ("max-bandwidth", "100", "104857600 bytes/second"),
        ("max-bandwidth", "1.5", "1572864 bytes/second"),
        ("max-bandwidth", "1k", "1024 bytes/second"),
        ("max-bandwidth", "0x10", "16777216 bytes/second"),
        (
            "max-bandwidth",
            "8796093022207",
            "9223372036853727232 bytes/second",
        ),
        ("max-bandwidth", "0", "0 bytes/second"),
        ("max-postcopy-bandwidth", "100", "100"),
        ("downtime-limit", "1k", "1024 ms"),
        ("downtime-limit", "2000000", "2000000 ms"),
        ("downtime-limit", "0", "0 ms"),
        ("x-checkpoint-delay", "4294967295", "4294967295 ms"),
        ("xbzrle-cache-size", "128M", "134217728 bytes"),
        ("cpu-throttle-tailslow", "yes", "on"),
        ("cpu-throttle-tailslow", "true", "on"),
        ("multifd-channels", "0x10", "16"),
        ("multifd-channels", "010", "8"),
        ("multifd-compression", "zstd", "zstd"),
        ("multifd-zlib-level", "9", "9"),
        ("announce-initial", "4k", "4096 ms"),
        ("vcpu-dirty-limit", "99999999999", "99999999999 MB/s"),
        ("zero-page-detection", "legacy", "legacy"),
        ("mode", "normal", "normal"),
        ("direct-io", "on", "on"),
        ("tls-creds", "", "''"),
        ("block-incremental", "on", "on"),
        ("compress-level", "0", "0"),
    ] {
        assert_eq!(shown(name, value), expected, "{name} {value}");
    }
}

#[test]
fn bad_values_are_refused_in_qemus_words() {
    for (name, value, text) in [
        ("foo", "1", "invalid parameter value: foo"),
        ("max-band", "5", "invalid parameter value: max-band"),
        ("max-bandwidth", "abc", "Invalid size abc"),
        ("max-bandwidth", "-1", "Invalid size -1"),
        ("max-bandwidth", "10x", "Invalid size 10x"),
        (
            "max-bandwidth",
            "8796093022208",
            "Invalid size 8796093022208",
        ),
        ("max-bandwidth", "16E", "Invalid size 16E"),
        ("avail-switchover-bandwidth", "abc", "Invalid size abc"),
        (
            "downtime-limit",
            "2000001",
            "Parameter 'downtime_limit' expects an integer in the range of 0 to (2000 * 1000) ms",
        ),
        (
            "downtime-limit",
            "-1",
            "Value '-1' is out of range for parameter 'downtime-limit'",
        ),
        (
            "x-checkpoint-delay",
            "4294967296",
            "Parameter 'x-checkpoint-delay' expects uint32_t",
        ),
        (
            "x-checkpoint-delay",
            "abc",
            "Parameter 'x-checkpoint-delay' expects uint64",
        ),
        (
            "x-checkpoint-delay",
            "-1",
            "Parameter 'x-checkpoint-delay' expects uint32_t",
        ),
        (
            "xbzrle-cache-size",
            "5000",
            "Parameter 'xbzrle_cache_size' expects a power of two no less than the target page size",
        ),
        (
            "xbzrle-cache-size",
            "16E",
            "Value '16E' is out of range for parameter 'xbzrle-cache-size'",
        ),
        (
            "cpu-throttle-initial",
            "0",
            "Parameter 'cpu_throttle_initial' expects an integer in the range of 1 to 99",
        ),
        ("xbzrle-cache-size", "8E", "Invalid size 8E"),
        (
            "multifd-qatzip-level",
            "10",
            "Parameter 'multifd_qatzip_level' expects a value between 1 and 9",
        ),
        (
            "cpu-throttle-initial",
            "abc",
            "Parameter 'cpu-throttle-initial' expects uint64",
        ),
        (
            "cpu-throttle-initial",
            "256",
            "Parameter 'cpu-throttle-initial' expects uint8_t",
        ),
        (
            "cpu-throttle-increment",
            "100",
            "Parameter 'cpu_throttle_increment' expects an integer in the range of 1 to 99",
        ),
        (
            "max-cpu-throttle",
            "5",
            "Parameter 'max_cpu_throttle' expects an integer in the range of cpu_throttle_initial to 99",
        ),
        (
            "max-cpu-throttle",
            "100",
            "Parameter 'max_cpu_throttle' expects an integer in the range of cpu_throttle_initial to 99",
        ),
        (
            "cpu-throttle-tailslow",
            "1",
            "Parameter 'cpu-throttle-tailslow' expects 'on' or 'off'",
        ),
        (
            "throttle-trigger-threshold",
            "101",
            "Parameter 'throttle_trigger_threshold' expects an integer in the range of 1 to 100",
        ),
        (
            "multifd-channels",
            "0",
            "Parameter 'multifd_channels' expects a value between 1 and 255",
        ),
        (
            "multifd-channels",
            "256",
            "Parameter 'multifd-channels' expects uint8_t",
        ),
        (
            "multifd-channels",
            "4k",
            "Parameter 'multifd-channels' expects uint64",
        ),
        (
            "multifd-compression",
            "lz4",
            "Parameter 'multifd-compression' does not accept value 'lz4'",
        ),
        (
            "multifd-zlib-level",
            "10",
            "Parameter 'multifd_zlib_level' expects a value between 0 and 9",
        ),
        (
            "multifd-zstd-level",
            "21",
            "Parameter 'multifd_zstd_level' expects a value between 0 and 20",
        ),
        (
            "announce-initial",
            "100001",
            "Parameter 'announce_initial' expects a value between 0 and 100000",
        ),
        (
            "announce-rounds",
            "1001",
            "Parameter 'announce_rounds' expects a value between 0 and 1000",
        ),
        (
            "announce-step",
            "0",
            "Parameter 'announce_step' expects a value between 0 and 10000",
        ),
        (
            "announce-step",
            "10001",
            "Parameter 'announce_step' expects a value between 0 and 10000",
        ),
        (
            "compress-level",
            "10",
            "Parameter 'compress_level' expects a value between 0 and 9",
        ),
        (
            "compress-threads",
            "0",
            "Parameter 'compress_threads' expects a value between 1 and 255",
        ),
        (
            "x-vcpu-dirty-limit-period",
            "1001",
            "Parameter 'x-vcpu-dirty-limit-period' expects a value between 1 and 1000",
        ),
        (
            "vcpu-dirty-limit",
            "0",
            "Parameter 'vcpu_dirty_limit' must be greater than 1 MB/s",
        ),
        (
            "mode",
            "foo",
            "Parameter 'mode' does not accept value 'foo'",
        ),
        (
            "zero-page-detection",
            "foo",
            "Parameter 'zero-page-detection' does not accept value 'foo'",
        ),
        (
            "direct-io",
            "x",
            "Parameter 'direct-io' expects 'on' or 'off'",
        ),
        (
            "block-bitmap-mapping",
            "x",
            "The block-bitmap-mapping parameter can only be set through QMP",
        ),
    ] {
        assert_eq!(refusal(name, value), text, "{name} {value}");
    }
    for name in [
        "downtime-limit",
        "max-postcopy-bandwidth",
        "xbzrle-cache-size",
        "announce-initial",
    ] {
        assert_eq!(
            refusal(name, "abc"),
            format!("Parameter '{name}' {NO_SIZE}")
        );
    }
}

#[test]
fn what_is_not_built_is_refused() {
    for (name, value) in [
        ("tls-creds", "tls0"),
        ("tls-hostname", "h"),
        ("tls-authz", "a"),
        ("mode", "cpr-reboot"),
        ("zero-page-detection", "none"),
    ] {
        assert_eq!(
            refusal(name, value),
            format!("Parameter '{name}': '{value}' is not built in this version")
        );
    }
}

#[test]
fn the_throttle_bounds_hold_in_either_order() {
    let mut parameters = Parameters::default();
    parameters.set("max-cpu-throttle", "30").unwrap();
    let error = parameters
        .set("cpu-throttle-initial", "40")
        .unwrap_err()
        .to_string();
    assert!(
        error.starts_with("Parameter 'max_cpu_throttle' expects"),
        "{error}"
    );
    parameters.set("cpu-throttle-initial", "30").unwrap();
}

proptest::proptest! {
    #[test]
    fn any_text_is_answered(place in 0..TABLE.len(), text in ".{0,20}") {
        let mut parameters = Parameters::default();
        let _ = parameters.set(TABLE[place].name, &text);
        let _ = parameters.set_property(TABLE[place].name, &text);
        proptest::prop_assert_eq!(parameters.list().len(), TABLE.len());
    }
}
