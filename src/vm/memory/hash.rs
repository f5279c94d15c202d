//! XXH3-64 of exactly one page, as wide as the processor can.
//!
//! The crate chooses its vector width when it is compiled, so a portable build hashes with SSE2,
//! which costs as much as moving the page. This is the same function for the one length that
//! matters, in three widths, chosen at run time: memory should be the limit. The crate remains
//! the reference (tests). Algorithm: the XXH3 specification, inputs over 240 bytes.
//! A child of the room `vm/memory`, and as that allowed `unsafe`.
#![expect(
    unsafe_code,
    reason = "functions for a processor feature are called after asking for it, and vectors loaded"
)]

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{
    __m256i, __m512i, _mm256_add_epi64, _mm256_loadu_si256, _mm256_mul_epu32, _mm256_set1_epi64x,
    _mm256_shuffle_epi32, _mm256_slli_epi64, _mm256_srli_epi64, _mm256_storeu_si256,
    _mm256_xor_si256, _mm512_add_epi64, _mm512_loadu_si512, _mm512_mul_epu32, _mm512_set1_epi64,
    _mm512_shuffle_epi32, _mm512_slli_epi64, _mm512_srli_epi64, _mm512_storeu_si512,
    _mm512_xor_si512,
};

use xxhash_rust::const_xxh3::const_custom_default_secret;

use super::PAGE_SIZE;

/// XXH3-64 of a page with that seed.
#[inline]
pub(super) fn page(bytes: &[u8; PAGE_SIZE], seed: u64) -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has AVX-512F.
            return unsafe { page_avx512(bytes, seed) };
        }
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has AVX2.
            return unsafe { page_avx2(bytes, seed) };
        }
    }
    page_portable(bytes, seed)
}

/// All eight lanes in one register, and the sixteen keys of a block in sixteen.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn page_avx512(bytes: &[u8; PAGE_SIZE], seed: u64) -> u64 {
    let secret = derived_secret(seed);
    let step = |lanes, stripe: &[u8; STRIPE], key| {
        let data = load512(stripe);
        let keyed = _mm512_xor_si512(data, key);
        let product = _mm512_mul_epu32(keyed, _mm512_srli_epi64::<32>(keyed));
        let swapped = _mm512_shuffle_epi32::<SWAP>(data);
        // The next stripe waits for one addition only.
        _mm512_add_epi64(lanes, _mm512_add_epi64(swapped, product))
    };
    let secret_bytes = secret_bytes(&secret);
    let key = |at: usize| load512(window(secret_bytes, at));
    let keys: [__m512i; STRIPES_PER_BLOCK] = std::array::from_fn(|within| key(within * 8));
    let scrambler = key(SCRAMBLE_AT);
    let prime = _mm512_set1_epi64(PRIME32_1 as i64);
    let mut lanes = load512(&initial_bytes());
    let (stripes, _) = bytes.as_chunks::<STRIPE>();
    let (blocks, rest) = stripes[..STRIPES - 1].as_chunks::<STRIPES_PER_BLOCK>();
    for block in blocks {
        for (stripe, key) in block.iter().zip(keys) {
            lanes = step(lanes, stripe, key);
        }
        let mixed = _mm512_xor_si512(lanes, _mm512_srli_epi64::<47>(lanes));
        let mixed = _mm512_xor_si512(mixed, scrambler);
        let high = _mm512_mul_epu32(_mm512_srli_epi64::<32>(mixed), prime);
        let low = _mm512_mul_epu32(mixed, prime);
        lanes = _mm512_add_epi64(low, _mm512_slli_epi64::<32>(high));
    }
    for (stripe, key) in rest.iter().zip(keys) {
        lanes = step(lanes, stripe, key);
    }
    lanes = step(lanes, &stripes[STRIPES - 1], key(LAST_AT));
    let mut words = [0; 8];
    // SAFETY: there is room for 64 bytes.
    unsafe { _mm512_storeu_si512(words.as_mut_ptr().cast(), lanes) };
    merge(&words, &secret)
}

/// Four lanes in each of two registers.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn page_avx2(bytes: &[u8; PAGE_SIZE], seed: u64) -> u64 {
    let secret = derived_secret(seed);
    let step = |lanes, data, key| {
        let keyed = _mm256_xor_si256(data, key);
        let product = _mm256_mul_epu32(keyed, _mm256_srli_epi64::<32>(keyed));
        let swapped = _mm256_shuffle_epi32::<SWAP>(data);
        _mm256_add_epi64(_mm256_add_epi64(lanes, swapped), product)
    };
    let secret_bytes = secret_bytes(&secret);
    let key = |at: usize| load256(window(secret_bytes, at));
    let prime = _mm256_set1_epi64x(PRIME32_1 as i64);
    let scramble = |lanes, key| {
        let mixed = _mm256_xor_si256(lanes, _mm256_srli_epi64::<47>(lanes));
        let mixed = _mm256_xor_si256(mixed, key);
        let high = _mm256_mul_epu32(_mm256_srli_epi64::<32>(mixed), prime);
        let low = _mm256_mul_epu32(mixed, prime);
        _mm256_add_epi64(low, _mm256_slli_epi64::<32>(high))
    };
    let scrambler = key(SCRAMBLE_AT);
    let (mut left, mut right) = load256(&initial_bytes());
    let (stripes, _) = bytes.as_chunks::<STRIPE>();
    for (index, stripe) in stripes[..STRIPES - 1].iter().enumerate() {
        let within = index % STRIPES_PER_BLOCK;
        let (data, key) = (load256(stripe), key(within * 8));
        left = step(left, data.0, key.0);
        right = step(right, data.1, key.1);
        if within == STRIPES_PER_BLOCK - 1 {
            left = scramble(left, scrambler.0);
            right = scramble(right, scrambler.1);
        }
    }
    let (data, key) = (load256(&stripes[STRIPES - 1]), key(LAST_AT));
    left = step(left, data.0, key.0);
    right = step(right, data.1, key.1);
    let mut words = [0; 8];
    // SAFETY: there is room for two times 32 bytes.
    unsafe {
        _mm256_storeu_si256(words.as_mut_ptr().cast(), left);
        _mm256_storeu_si256(words.as_mut_ptr().add(4).cast(), right);
    }
    merge(&words, &secret)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
#[inline]
fn load512(bytes: &[u8; STRIPE]) -> __m512i {
    // SAFETY: 64 bytes can be read.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
#[inline]
fn load256(bytes: &[u8; STRIPE]) -> (__m256i, __m256i) {
    let (low, high) = bytes.split_at(STRIPE / 2);
    // SAFETY: 32 bytes can be read from either half.
    unsafe {
        (
            _mm256_loadu_si256(low.as_ptr().cast()),
            _mm256_loadu_si256(high.as_ptr().cast()),
        )
    }
}

/// The secret as the processors with wide vectors see it; they are little-endian.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn secret_bytes(secret: &[u64; SECRET]) -> &[u8; SECRET * 8] {
    // SAFETY: the same memory, and bytes have no alignment and no invalid value.
    unsafe { &*std::ptr::from_ref(secret).cast() }
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn window(secret: &[u8; SECRET * 8], at: usize) -> &[u8; STRIPE] {
    // Never missing: every caller's `at` is at most SCRAMBLE_AT.
    secret[at..].first_chunk().unwrap_or(&[0; STRIPE])
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn initial_bytes() -> [u8; STRIPE] {
    let mut bytes = [0; STRIPE];
    for (to, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(INITIAL) {
        *to = word.to_le_bytes();
    }
    bytes
}

#[inline(always)]
fn page_portable(bytes: &[u8; PAGE_SIZE], seed: u64) -> u64 {
    let secret = derived_secret(seed);
    let mut lanes = INITIAL;
    let (stripes, _) = bytes.as_chunks::<STRIPE>();
    for (index, stripe) in stripes[..STRIPES - 1].iter().enumerate() {
        let within = index % STRIPES_PER_BLOCK;
        accumulate(&mut lanes, stripe, |lane| secret[within + lane]);
        if within == STRIPES_PER_BLOCK - 1 {
            scramble(&mut lanes, &secret);
        }
    }
    accumulate(&mut lanes, &stripes[STRIPES - 1], |lane| {
        unaligned(&secret, LAST_AT + lane * 8)
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
/// Where in the secret the words for scrambling are, and those for the last stripe, bytes.
const SCRAMBLE_AT: usize = (SECRET - 8) * 8;
const LAST_AT: usize = SCRAMBLE_AT - 7;
/// Exchanges the halves of each pair of lanes.
#[cfg(target_arch = "x86_64")]
const SWAP: i32 = 0b01_00_11_10;
const INITIAL: [u64; 8] = [
    PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1,
];
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
        fn every_width_is_xxh3(content in proptest::collection::vec(any::<u8>(), PAGE_SIZE), seed: u64) {
            let content: &[u8; PAGE_SIZE] = content[..].try_into().unwrap();
            let expected = xxh3_64_with_seed(content, seed);
            prop_assert_eq!(page_portable(content, seed), expected);
            prop_assert_eq!(page(content, seed), expected);
            #[cfg(target_arch = "x86_64")]
            {
                if std::arch::is_x86_feature_detected!("avx2") {
                    // SAFETY: the processor has AVX2.
                    prop_assert_eq!(unsafe { page_avx2(content, seed) }, expected);
                }
                if std::arch::is_x86_feature_detected!("avx512f") {
                    // SAFETY: the processor has AVX-512F.
                    prop_assert_eq!(unsafe { page_avx512(content, seed) }, expected);
                }
            }
        }
    }
}
