//! XXH3-64 of exactly one page, as wide as the processor can.
//!
//! The crate chooses its vector width when it is compiled, so a portable build hashes with SSE2,
//! which costs as much as moving the page. This is the same function for the one length that
//! matters, written so that the compiler can vectorise it, and chosen at run time. The crate
//! remains the reference (tests). Algorithm: the XXH3 specification, inputs over 240 bytes.
//! A child of the room `vm/memory`, and as that allowed one `unsafe` call.
#![expect(
    unsafe_code,
    reason = "a function for a processor feature is called after asking for it"
)]

use xxhash_rust::const_xxh3::const_custom_default_secret;

use super::PAGE_SIZE;

/// XXH3-64 of a page with that seed.
#[inline]
pub(super) fn page(bytes: &[u8; PAGE_SIZE], seed: u64) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2.
        return unsafe { page_avx2(bytes, seed) };
    }
    page_portable(bytes, seed)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn page_avx2(bytes: &[u8; PAGE_SIZE], seed: u64) -> u64 {
    page_portable(bytes, seed)
}

#[inline(always)]
fn page_portable(bytes: &[u8; PAGE_SIZE], seed: u64) -> u64 {
    let secret = derived_secret(seed);
    let mut lanes = [
        PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1,
    ];
    let (stripes, _) = bytes.as_chunks::<STRIPE>();
    for (index, stripe) in stripes[..STRIPES - 1].iter().enumerate() {
        let within = index % STRIPES_PER_BLOCK;
        accumulate(&mut lanes, stripe, |lane| secret[within + lane]);
        if within == STRIPES_PER_BLOCK - 1 {
            scramble(&mut lanes, &secret);
        }
    }
    accumulate(&mut lanes, &stripes[STRIPES - 1], |lane| {
        unaligned(&secret, (SECRET - 8) * 8 - 7 + lane * 8)
    });
    merge(&lanes, &secret)
}

#[inline(always)]
fn derived_secret(seed: u64) -> [u64; SECRET] {
    let mut secret = DEFAULT_SECRET;
    for pair in secret.as_chunks_mut::<2>().0 {
        pair[0] = pair[0].wrapping_add(seed);
        pair[1] = pair[1].wrapping_sub(seed);
    }
    secret
}

#[inline(always)]
fn accumulate(lanes: &mut [u64; 8], stripe: &[u8; STRIPE], secret: impl Fn(usize) -> u64) {
    let (words, _) = stripe.as_chunks::<8>();
    let mut data = [0; 8];
    for lane in 0..8 {
        data[lane] = u64::from_le_bytes(words[lane]);
    }
    let mut next = [0; 8];
    for lane in 0..8 {
        let keyed = data[lane] ^ secret(lane);
        let product = (keyed & 0xffff_ffff).wrapping_mul(keyed >> 32);
        next[lane] = lanes[lane]
            .wrapping_add(data[lane ^ 1])
            .wrapping_add(product);
    }
    *lanes = next;
}

#[inline(always)]
fn scramble(lanes: &mut [u64; 8], secret: &[u64; SECRET]) {
    for lane in 0..8 {
        let mixed = lanes[lane] ^ (lanes[lane] >> 47) ^ secret[SECRET - 8 + lane];
        lanes[lane] = mixed.wrapping_mul(PRIME32_1);
    }
}

#[inline(always)]
fn merge(lanes: &[u64; 8], secret: &[u64; SECRET]) -> u64 {
    let mut hash = (PAGE_SIZE as u64).wrapping_mul(PRIME64_1);
    for (index, pair) in lanes.as_chunks::<2>().0.iter().enumerate() {
        let at = 11 + 16 * index;
        let product = u128::from(pair[0] ^ unaligned(secret, at))
            .wrapping_mul(u128::from(pair[1] ^ unaligned(secret, at + 8)));
        hash = hash.wrapping_add(product as u64 ^ (product >> 64) as u64);
    }
    hash ^= hash >> 37;
    hash = hash.wrapping_mul(0x1656_6791_9E37_79F9);
    hash ^ (hash >> 32)
}

/// The 8 bytes at an odd byte offset of the secret.
#[inline(always)]
fn unaligned(secret: &[u64; SECRET], at: usize) -> u64 {
    let (word, shift) = (at / 8, at % 8 * 8);
    secret[word] >> shift | secret[word + 1] << (64 - shift)
}

const fn default_secret() -> [u64; SECRET] {
    let bytes = const_custom_default_secret(0);
    let mut words = [0; SECRET];
    let mut at = 0;
    while at < SECRET * 8 {
        words[at / 8] |= (bytes[at] as u64) << (at % 8 * 8);
        at += 1;
    }
    words
}

const STRIPE: usize = 64;
const STRIPES: usize = PAGE_SIZE / STRIPE;
/// Words of the secret.
const SECRET: usize = 24;
const STRIPES_PER_BLOCK: usize = SECRET - 8;
const DEFAULT_SECRET: [u64; SECRET] = default_secret();
const PRIME32_1: u64 = 0x9E37_79B1;
const PRIME32_2: u64 = 0x85EB_CA77;
const PRIME32_3: u64 = 0xC2B2_AE3D;
const PRIME64_1: u64 = 0x9E37_79B1_85EB_CA87;
const PRIME64_2: u64 = 0xC2B2_AE3D_27D4_EB4F;
const PRIME64_3: u64 = 0x1656_67B1_9E37_79F9;
const PRIME64_4: u64 = 0x85EB_CA77_C2B2_AE63;
const PRIME64_5: u64 = 0x27D4_EB2F_1656_67C5;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use xxhash_rust::xxh3::xxh3_64_with_seed;

    proptest! {
        #[test]
        fn both_widths_are_xxh3(content in proptest::collection::vec(any::<u8>(), PAGE_SIZE), seed: u64) {
            let content: &[u8; PAGE_SIZE] = content[..].try_into().unwrap();
            let expected = xxh3_64_with_seed(content, seed);
            prop_assert_eq!(page_portable(content, seed), expected);
            prop_assert_eq!(page(content, seed), expected);
        }
    }
}
