//! Numbers that can be fields: their width, sign and QEMU's word for their type.

/// A number of 1 to 8 bytes on the wire. Its bits travel as a `u64`, sign-extended if signed.
pub trait Number: Copy {
    /// QEMU's type word.
    const KIND: &'static str;
    /// Bytes on the wire.
    const SIZE: usize;
    /// Whether it is signed.
    const SIGNED: bool;
    /// Smallest value.
    const MIN: Self;
    /// Largest value.
    const MAX: Self;

    /// The value's bits, sign-extended if signed.
    fn to_bits(self) -> u64;

    /// The value of these bits; bits beyond its width are ignored.
    fn from_bits(bits: u64) -> Self;
}

macro_rules! numbers {
    ($($type:ty, $wide:ty, $kind:literal, $signed:literal;)*) => {$(
        impl Number for $type {
            const KIND: &'static str = $kind;
            const SIZE: usize = size_of::<Self>();
            const SIGNED: bool = $signed;
            const MIN: Self = <$type>::MIN;
            const MAX: Self = <$type>::MAX;

            fn to_bits(self) -> u64 {
                <$wide>::from(self) as u64
            }

            fn from_bits(bits: u64) -> Self {
                bits as Self
            }
        }
    )*};
}

numbers! {
    u8, u64, "uint8", false;
    u16, u64, "uint16", false;
    u32, u64, "uint32", false;
    u64, u64, "uint64", false;
    i32, i64, "int32", true;
    i64, i64, "int64", true;
}

impl Number for bool {
    const KIND: &'static str = "bool";
    const SIZE: usize = 1;
    const SIGNED: Self = false;
    const MIN: Self = false;
    const MAX: Self = true;

    fn to_bits(self) -> u64 {
        u64::from(self)
    }

    fn from_bits(bits: u64) -> Self {
        bits != 0
    }
}
