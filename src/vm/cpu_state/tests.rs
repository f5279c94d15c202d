use proptest::prelude::*;
use serde_json::Value;

use super::*;
use crate::vmstate::{describe, load, save};

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

fn loaded(bytes: &[u8]) -> crate::vmstate::Result<CpuState> {
    let mut state = CpuState::at_reset(0);
    load(&mut state, 12, &mut &bytes[..]).map(|()| state)
}

#[test]
fn the_fixed_body_is_1817_bytes_with_fields_where_qemu_has_them() {
    let mut state = CpuState::at_reset(0);
    state.regs[15] = 0x1122_3344_5566_7788;
    state.tsc = 0x0102_0304_0506_0708;
    state.xcr0 = 7;
    let bytes = save(&mut state).unwrap();
    assert_eq!(bytes.len(), 1817);
    assert_eq!(bytes[120..128], 0x1122_3344_5566_7788u64.to_be_bytes());
    assert_eq!(bytes[128..136], 0xfff0u64.to_be_bytes());
    assert_eq!(bytes[1149..1153], (-1i32).to_be_bytes());
    assert_eq!(bytes[1157..1165], 0x0102_0304_0506_0708u64.to_be_bytes());
    assert_eq!(bytes[1545..1553], 7u64.to_be_bytes());
    assert_eq!(loaded(&bytes).unwrap(), state);
}

#[test]
fn version_11_ends_before_the_extended_state() {
    let bytes = save(&mut CpuState::at_reset(0)).unwrap();
    let mut state = CpuState::at_reset(0);
    let mut rest = &bytes[..1545];
    load(&mut state, 11, &mut rest).unwrap();
    assert!(rest.is_empty());
    assert_eq!(state, CpuState::at_reset(0));
    let error = load(&mut state, 13, &mut &bytes[..])
        .unwrap_err()
        .to_string();
    assert_eq!(
        error,
        "cpu: incoming version_id 13 is too new for local version_id 12"
    );
}

#[test]
fn every_subsection_has_its_size() {
    let mut state = CpuState::at_reset(0);
    for subsection in SUBSECTIONS {
        let mut size = 0;
        let mut alone = CpuState::at_reset(0);
        for len in (0..20_000).step_by(1) {
            // The shortest body that loads is the subsection's length.
            let zeros = vec![0; len];
            let mut body = save(&mut CpuState::at_reset(0)).unwrap();
            body.push(5);
            body.push(subsection.name.len() as u8);
            body.extend_from_slice(subsection.name.as_bytes());
            body.extend_from_slice(&1u32.to_be_bytes());
            body.extend_from_slice(&zeros);
            if load(&mut alone, 12, &mut &body[..]).is_ok() {
                size = len;
                break;
            }
        }
        let expected = match subsection.name {
            "cpu/fpop_ip_dp" => 18,
            "cpu/msr_architectural_pmu" => 32 + 24 + 144 + 144,
            "cpu/mpx" => 88,
            "cpu/avx512" => 1600,
            "cpu/umwait" | "cpu/pkru" | "cpu/pkrs" | "cpu/msr_tsx_ctrl" | "cpu/svm_guest" => 4,
            "cpu/msr_xfd" => 16,
            "cpu/intel_sgx" | "cpu/pdptrs" => 32,
            "cpu/intel_amx_xtile" => 64 + 8192,
            "cpu/arch_lbr" => 16 + 768,
            "cpu/triple_fault" => 1,
            "cpu/exception_info" => 11,
            "cpu/intel_pt" => 104,
            "cpu/svn_npt" => 12,
            "cpu/msr_hyperv_hypercall" => 16,
            "cpu/msr_hyperv_crash" => 40,
            "cpu/msr_hyperv_synic" => 152,
            "cpu/msr_hyperv_stimer" => 64,
            "cpu/msr_hyperv_reenlightenment" => 24,
            _ => 8,
        };
        assert_eq!(size, expected, "{}", subsection.name);
        (subsection.fields)(&mut state, &mut Filler(1)).unwrap();
    }
    // All of them at once survive a round trip, and the description adds up.
    let bytes = save(&mut state).unwrap();
    assert_eq!(loaded(&bytes).unwrap(), state);
    assert_eq!(
        described_size(&describe(&mut state).unwrap()),
        bytes.len() as u64
    );
}

/// Writes a value into every field.
struct Filler(u64);

impl Visitor for Filler {
    fn numbers(
        &mut self,
        field: &crate::vmstate::Field,
        at: &mut dyn FnMut(usize, Option<u64>) -> u64,
    ) -> Result {
        for index in 0..field.array.unwrap_or(1) {
            at(index, Some(self.0 + u64::from(field.size == 8)));
        }
        Ok(())
    }

    fn bytes(&mut self, _: &'static str, _: &'static str, bytes: &mut [u8]) -> Result {
        bytes.fill(self.0 as u8);
        Ok(())
    }

    fn structure(&mut self, of: &crate::vmstate::Struct, body: crate::vmstate::Body<'_>) -> Result {
        (0..of.array.unwrap_or(1)).try_for_each(|index| body(index, self))
    }

    fn subsections(
        &mut self,
        _: &'static str,
        _: &[crate::vmstate::Candidate],
        _: crate::vmstate::Body<'_>,
    ) -> Result {
        Ok(())
    }

    fn end(&mut self, _: &mut dyn FnMut() -> std::result::Result<(), String>) -> Result {
        Ok(())
    }
}

#[test]
fn values_that_would_kill_the_guest_are_refused() {
    let good = save(&mut CpuState::at_reset(0)).unwrap();
    let cases: [(usize, &[u8], &str); 6] = [
        (
            154,
            &[0, 1],
            "cpu: field 'env.fpregs_format_vmstate' is 0x1, legal is 0x0",
        ),
        (
            1149,
            &[0, 0, 1, 0],
            "cpu: field 'env.interrupt_injected' is 256, legal is -1 to 255",
        ),
        (
            1153,
            &[0, 0, 0, 9],
            "cpu: field 'env.mp_state' is 0x9, legal is 0x0 to 0x4",
        ),
        (
            1165,
            &[0, 0, 0, 32],
            "cpu: field 'env.exception_nr' is 32, legal is -1 to 31",
        ),
        (1545, &[0; 8], "cpu: env.xcr0 is 0x0, bit 0 must be set"),
        (144, &[0, 0x20, 0, 0], "cpu: env.hflags 0x200000 says"),
    ];
    for (at, bytes, text) in cases {
        let mut bad = good.clone();
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        let error = loaded(&bad).unwrap_err().to_string();
        assert!(error.starts_with(text), "{error}");
    }
}

#[test]
fn every_cut_is_an_error() {
    let bytes = save(&mut CpuState::at_reset(0)).unwrap();
    for cut in 0..bytes.len() {
        assert!(loaded(&bytes[..cut]).is_err(), "cut at {cut}");
    }
}

proptest! {
    #[test]
    fn any_bytes_load_or_fail(bytes in proptest::collection::vec(any::<u8>(), 1817..2400)) {
        let _ = loaded(&bytes);
    }
}
