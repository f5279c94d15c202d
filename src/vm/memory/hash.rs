//! A page's hash, as wide as the processor can.
//!
//! XXH3-64 of the content, and then XXH3-64 of those 8 bytes (little-endian) with the page's place as
//! seed. The content alone is hashed without a seed because a seed would have the keys computed
//! anew for every page, which takes as long as a third of the page.
//!
//! The crate chooses its vector width when it is compiled, so a portable build hashes with SSE2,
//! which costs as much as moving the page. This is the same function for the one length that
//! matters, in three widths, chosen at run time: memory should be the limit. The crate remains
//! the reference (tests). Algorithm: the XXH3 specification, inputs over 240 bytes. Where it adds
//! each word to the lane beside its own, here the words are added up first: the lanes then wait
//! for fewer additions, and the exchange is done once per block.
//! A child of the room `vm/memory`, and as that allowed `unsafe`.
#![expect(
    unsafe_code,
    reason = "functions for a processor feature are called after asking for it, and vectors loaded"
)]

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{
    __m256i, __m512i, _mm256_add_epi64, _mm256_loadu_si256, _mm256_mul_epu32, _mm256_set1_epi64x,
    _mm256_setzero_si256, _mm256_shuffle_epi32, _mm256_slli_epi64, _mm256_srli_epi64,
    _mm256_storeu_si256, _mm256_xor_si256, _mm512_add_epi64, _mm512_loadu_si512, _mm512_mul_epu32,
    _mm512_set1_epi64, _mm512_setzero_si512, _mm512_shuffle_epi32, _mm512_slli_epi64,
    _mm512_srli_epi64, _mm512_storeu_si512, _mm512_xor_si512,
};

use xxhash_rust::const_xxh3::const_custom_default_secret;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::PAGE_SIZE;

/// Hash of a page with that content at that place.
#[inline]
pub fn page(bytes: &[u8; PAGE_SIZE], place: u64) -> u64 {
    xxh3_64_with_seed(&content(bytes).to_le_bytes(), place)
}

/// XXH3-64 of a page.
#[inline]
fn content(bytes: &[u8; PAGE_SIZE]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has AVX-512F.
            return unsafe { content_avx512(bytes) };
        }
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has AVX2.
            return unsafe { content_avx2(bytes) };
        }
    }
    content_portable(bytes)
}

/// All eight lanes in one register.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn content_avx512(bytes: &[u8; PAGE_SIZE]) -> u64 {
    let product = |data, key| {
        let keyed = _mm512_xor_si512(data, key);
        _mm512_mul_epu32(keyed, _mm512_srli_epi64::<32>(keyed))
    };
    let accumulate = |lanes, stripes: &[Stripe]| {
        let (mut lanes, mut sums) = (lanes, _mm512_setzero_si512());
        for (stripe, key) in stripes.iter().zip(&KEYS.stripes) {
            let data = load512(stripe);
            lanes = _mm512_add_epi64(lanes, product(data, load512(key)));
            sums = _mm512_add_epi64(sums, data);
        }
        _mm512_add_epi64(lanes, _mm512_shuffle_epi32::<SWAP>(sums))
    };
    let prime = _mm512_set1_epi64(PRIME32_1 as i64);
    let scramble = |lanes| {
        let mixed = _mm512_xor_si512(lanes, _mm512_srli_epi64::<47>(lanes));
        let mixed = _mm512_xor_si512(mixed, load512(&KEYS.scrambler));
        let high = _mm512_mul_epu32(_mm512_srli_epi64::<32>(mixed), prime);
        let low = _mm512_mul_epu32(mixed, prime);
        _mm512_add_epi64(low, _mm512_slli_epi64::<32>(high))
    };
    let (blocks, rest, last) = split(bytes);
    let mut lanes = load512(&KEYS.initial);
    for block in blocks {
        lanes = scramble(accumulate(lanes, block));
    }
    lanes = accumulate(lanes, rest);
    let data = load512(last);
    lanes = _mm512_add_epi64(lanes, product(data, load512(&KEYS.last)));
    lanes = _mm512_add_epi64(lanes, _mm512_shuffle_epi32::<SWAP>(data));
    let mut words = [0; 8];
    // SAFETY: there is room for 64 bytes.
    unsafe { _mm512_storeu_si512(words.as_mut_ptr().cast(), lanes) };
    merge(&words)
}

/// Four lanes in each of two registers.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn content_avx2(bytes: &[u8; PAGE_SIZE]) -> u64 {
    let add = |a: [__m256i; 2], b: [__m256i; 2]| {
        [_mm256_add_epi64(a[0], b[0]), _mm256_add_epi64(a[1], b[1])]
    };
    let swap = |sums: [__m256i; 2]| sums.map(|half| _mm256_shuffle_epi32::<SWAP>(half));
    let product = |data: [__m256i; 2], key: [__m256i; 2]| {
        std::array::from_fn(|half| {
            let keyed = _mm256_xor_si256(data[half], key[half]);
            _mm256_mul_epu32(keyed, _mm256_srli_epi64::<32>(keyed))
        })
    };
    let accumulate = |lanes, stripes: &[Stripe]| {
        let (mut lanes, mut sums) = (lanes, [_mm256_setzero_si256(); 2]);
        for (stripe, key) in stripes.iter().zip(&KEYS.stripes) {
            let data = load256(stripe);
            lanes = add(lanes, product(data, load256(key)));
            sums = add(sums, data);
        }
        add(lanes, swap(sums))
    };
    let prime = _mm256_set1_epi64x(PRIME32_1 as i64);
    let scramble = |lanes: [__m256i; 2]| {
        let key = load256(&KEYS.scrambler);
        std::array::from_fn(|half| {
            let mixed = _mm256_xor_si256(lanes[half], _mm256_srli_epi64::<47>(lanes[half]));
            let mixed = _mm256_xor_si256(mixed, key[half]);
            let high = _mm256_mul_epu32(_mm256_srli_epi64::<32>(mixed), prime);
            let low = _mm256_mul_epu32(mixed, prime);
            _mm256_add_epi64(low, _mm256_slli_epi64::<32>(high))
        })
    };
    let (blocks, rest, last) = split(bytes);
    let mut lanes = load256(&KEYS.initial);
    for block in blocks {
        lanes = scramble(accumulate(lanes, block));
    }
    lanes = accumulate(lanes, rest);
    let data = load256(last);
    lanes = add(lanes, product(data, load256(&KEYS.last)));
    lanes = add(lanes, swap(data));
    let mut words = [0; 8];
    // SAFETY: there is room for two times 32 bytes.
    unsafe {
        _mm256_storeu_si256(words.as_mut_ptr().cast(), lanes[0]);
        _mm256_storeu_si256(words.as_mut_ptr().add(4).cast(), lanes[1]);
    }
    merge(&words)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
#[inline]
fn load512(bytes: &Stripe) -> __m512i {
    // SAFETY: 64 bytes can be read.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
#[inline]
fn load256(bytes: &Stripe) -> [__m256i; 2] {
    let (low, high) = bytes.split_at(STRIPE / 2);
    // SAFETY: 32 bytes can be read from either half.
    unsafe {
        [
            _mm256_loadu_si256(low.as_ptr().cast()),
            _mm256_loadu_si256(high.as_ptr().cast()),
        ]
    }
}

fn content_portable(bytes: &[u8; PAGE_SIZE]) -> u64 {
    let (blocks, rest, last) = split(bytes);
    let mut lanes = words(&KEYS.initial);
    for block in blocks {
        lanes = accumulate(lanes, block, &KEYS.stripes);
        for (lane, key) in lanes.iter_mut().zip(words(&KEYS.scrambler)) {
            *lane = (*lane ^ (*lane >> 47) ^ key).wrapping_mul(PRIME32_1);
        }
    }
    lanes = accumulate(lanes, rest, &KEYS.stripes);
    merge(&accumulate(lanes, &[*last], &[KEYS.last]))
}

fn accumulate(mut lanes: [u64; 8], stripes: &[Stripe], keys: &[Stripe]) -> [u64; 8] {
    let mut sums = [0u64; 8];
    for (stripe, key) in stripes.iter().zip(keys) {
        let (data, key) = (words(stripe), words(key));
        for lane in 0..8 {
            let keyed = data[lane] ^ key[lane];
            let product = (keyed & 0xffff_ffff).wrapping_mul(keyed >> 32);
            lanes[lane] = lanes[lane].wrapping_add(product);
            sums[lane] = sums[lane].wrapping_add(data[lane]);
        }
    }
    std::array::from_fn(|lane| lanes[lane].wrapping_add(sums[lane ^ 1]))
}

/// The parts that are hashed in turn: blocks, each followed by scrambling, the stripes after them,
/// and the last stripe.
#[inline(always)]
fn split(bytes: &[u8; PAGE_SIZE]) -> (&[[Stripe; STRIPES_PER_BLOCK]], &[Stripe], &Stripe) {
    let (stripes, _) = bytes.as_chunks();
    let (blocks, rest) = stripes[..STRIPES - 1].as_chunks();
    (blocks, rest, &stripes[STRIPES - 1])
}

#[inline(always)]
fn merge(lanes: &[u64; 8]) -> u64 {
    let keys = words(&KEYS.merger);
    let mut hash = (PAGE_SIZE as u64).wrapping_mul(PRIME64_1);
    for pair in 0..4 {
        let [left, right] =
            [2 * pair, 2 * pair + 1].map(|lane| u128::from(lanes[lane] ^ keys[lane]));
        let product = left.wrapping_mul(right);
        hash = hash.wrapping_add(product as u64 ^ (product >> 64) as u64);
    }
    hash ^= hash >> 37;
    hash = hash.wrapping_mul(0x1656_6791_9E37_79F9);
    hash ^ (hash >> 32)
}

#[inline(always)]
fn words(bytes: &Stripe) -> [u64; 8] {
    let (words, _) = bytes.as_chunks();
    std::array::from_fn(|lane| u64::from_le_bytes(words[lane]))
}

/// What is mixed in at each step: windows of the default secret, which overlap, laid out so that
/// each can be loaded at once.
#[repr(align(64))]
struct Keys {
    stripes: [Stripe; STRIPES_PER_BLOCK],
    scrambler: Stripe,
    last: Stripe,
    merger: Stripe,
    initial: Stripe,
}

static KEYS: Keys = Keys::new();

impl Keys {
    const fn new() -> Self {
        let mut stripes = [[0; STRIPE]; STRIPES_PER_BLOCK];
        let mut stripe = 0;
        while stripe < STRIPES_PER_BLOCK {
            stripes[stripe] = Self::window(stripe * 8);
            stripe += 1;
        }
        let mut initial = [0; STRIPE];
        let mut at = 0;
        while at < STRIPE {
            initial[at] = INITIAL[at / 8].to_le_bytes()[at % 8];
            at += 1;
        }
        Self {
            stripes,
            scrambler: Self::window(SECRET - STRIPE),
            last: Self::window(SECRET - STRIPE - 7),
            merger: Self::window(11),
            initial,
        }
    }

    const fn window(from: usize) -> Stripe {
        let secret = const_custom_default_secret(0);
        let mut window = [0; STRIPE];
        let mut at = 0;
        while at < STRIPE {
            window[at] = secret[from + at];
            at += 1;
        }
        window
    }
}

const STRIPE: usize = 64;
type Stripe = [u8; STRIPE];
const STRIPES: usize = PAGE_SIZE / STRIPE;
/// Bytes of the secret.
const SECRET: usize = 192;
const STRIPES_PER_BLOCK: usize = (SECRET - STRIPE) / 8;
/// Exchanges the halves of each pair of lanes.
#[cfg(target_arch = "x86_64")]
const SWAP: i32 = 0b01_00_11_10;
const INITIAL: [u64; 8] = [
    PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1,
];
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
    use xxhash_rust::xxh3::xxh3_64;

    proptest! {
        #[test]
        fn every_width_is_xxh3(bytes in proptest::collection::vec(any::<u8>(), PAGE_SIZE), place: u64) {
            let bytes: &[u8; PAGE_SIZE] = bytes[..].try_into().unwrap();
            let expected = xxh3_64(bytes);
            prop_assert_eq!(content_portable(bytes), expected);
            prop_assert_eq!(page(bytes, place), xxh3_64_with_seed(&expected.to_le_bytes(), place));
            #[cfg(target_arch = "x86_64")]
            {
                if std::arch::is_x86_feature_detected!("avx2") {
                    // SAFETY: the processor has AVX2.
                    prop_assert_eq!(unsafe { content_avx2(bytes) }, expected);
                }
                if std::arch::is_x86_feature_detected!("avx512f") {
                    // SAFETY: the processor has AVX-512F.
                    prop_assert_eq!(unsafe { content_avx512(bytes) }, expected);
                }
            }
        }
    }
}
