//! The registers of a 16550A, as QEMU keeps and migrates them. Pure: no threads, no clock.
//!
//! Transmission takes no time: the transmitter is always empty again when a write returns. The
//! receiver's character time-out takes no time either; a guest that asks for it is told at once.
//! QEMU's section `serial` version 3, a struct within a struct.

use crate::vmstate::{Result, Subsection, Visitor, VmState};

/// Bytes each FIFO holds.
pub(crate) const FIFO_SIZE: usize = 16;

/// The chip.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Uart {
    divider: u16,
    rbr: u8,
    ier: u8,
    iir: u8,
    lcr: u8,
    mcr: u8,
    lsr: u8,
    msr: u8,
    scr: u8,
    fcr: u8,
    thr: u8,
    tsr: u8,
    tsr_retry: u32,
    /// Transmitter interrupt pending: 0, 1, or -1 while loading a stream that has not said.
    thr_ipending: i32,
    timeout_ipending: i32,
    recv_fifo: Fifo,
    xmit_fifo: Fifo,
    fifo_timeout_timer: i64,
    poll_msl: i32,
    modem_status_poll: i64,
}

impl Default for Uart {
    /// The chip at reset: 9600 baud, idle, terminal ready.
    fn default() -> Self {
        Self {
            divider: 12,
            rbr: 0,
            ier: 0,
            iir: IIR_NONE,
            lcr: 0,
            mcr: 0x08,
            lsr: LSR_TEMT | LSR_THRE,
            msr: 0xb0,
            scr: 0,
            fcr: 0,
            thr: 0,
            tsr: 0,
            tsr_retry: 0,
            thr_ipending: 0,
            timeout_ipending: 0,
            recv_fifo: Fifo::default(),
            xmit_fifo: Fifo::default(),
            fifo_timeout_timer: -1,
            poll_msl: -1,
            modem_status_poll: -1,
        }
    }
}

impl Uart {
    /// The chip to load a stream into.
    pub(crate) fn incoming() -> Self {
        Self {
            thr_ipending: -1,
            ..Self::default()
        }
    }

    /// Reads register 0 to 7.
    pub(crate) fn read(&mut self, register: u8) -> u8 {
        let [low, high] = self.divider.to_le_bytes();
        match register & 7 {
            0 if self.is_divisor_latched() => low,
            1 if self.is_divisor_latched() => high,
            0 => self.take_received(),
            1 => self.ier,
            2 => {
                let iir = self.iir;
                if iir & IIR_ID == IIR_THRI {
                    self.thr_ipending = 0;
                    self.update_irq();
                }
                iir
            }
            3 => self.lcr,
            4 => self.mcr,
            5 => {
                let lsr = self.lsr;
                if lsr & (LSR_BI | LSR_OE) != 0 {
                    self.lsr &= !(LSR_BI | LSR_OE);
                    self.update_irq();
                }
                lsr
            }
            6 if self.mcr & MCR_LOOP != 0 => {
                (self.mcr & 0x0c) << 4 | (self.mcr & 0x02) << 3 | (self.mcr & 0x01) << 5
            }
            6 => {
                let msr = self.msr;
                if msr & MSR_ANY_DELTA != 0 {
                    self.msr &= !MSR_ANY_DELTA;
                    self.update_irq();
                }
                msr
            }
            _ => self.scr,
        }
    }

    /// Writes register 0 to 7; returns the byte that left the transmitter, if one did.
    pub(crate) fn write(&mut self, register: u8, value: u8) -> Option<u8> {
        match register & 7 {
            0 if self.is_divisor_latched() => {
                self.divider = self.divider & 0xff00 | u16::from(value);
            }
            1 if self.is_divisor_latched() => {
                self.divider = self.divider & 0x00ff | u16::from(value) << 8;
            }
            0 => return self.transmit(value),
            1 => self.write_ier(value & 0x0f),
            2 => self.write_fcr(value),
            3 => self.lcr = value,
            4 => self.mcr = value & 0x1f,
            7 => self.scr = value,
            _ => {}
        }
        None
    }

    /// Whether the interrupt line is high.
    pub(crate) fn irq(&self) -> bool {
        self.iir & IIR_NONE == 0
    }

    /// How many bytes the receiver takes now.
    pub(crate) fn room(&self) -> usize {
        if self.mcr & MCR_LOOP != 0 {
            0
        } else if self.fcr & FCR_FE != 0 {
            FIFO_SIZE - self.recv_fifo.len()
        } else {
            usize::from(self.lsr & LSR_DR == 0)
        }
    }

    /// Takes bytes from outside, as many as there is room for; returns how many.
    pub(crate) fn receive(&mut self, bytes: &[u8]) -> usize {
        let count = bytes.len().min(self.room());
        for byte in &bytes[..count] {
            self.receive_one(*byte);
        }
        count
    }

    /// Ends what another machine had under way: returns the bytes its transmitter still held.
    pub(crate) fn settle(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        if self.lsr & LSR_TEMT == 0 {
            bytes.push(self.tsr);
            if self.fcr & FCR_FE == 0 && self.lsr & LSR_THRE == 0 {
                bytes.push(self.thr);
            }
        }
        while let Some(byte) = self.xmit_fifo.pop() {
            bytes.push(byte);
        }
        self.tsr_retry = 0;
        if !bytes.is_empty() {
            self.thr_ipending = 1;
        }
        self.lsr |= LSR_THRE | LSR_TEMT;
        if self.fifo_timeout_timer != -1 {
            self.fifo_timeout_timer = -1;
            self.time_out();
        }
        self.update_irq();
        bytes
    }

    fn is_divisor_latched(&self) -> bool {
        self.lcr & LCR_DLAB != 0
    }

    fn receive_one(&mut self, byte: u8) {
        if self.fcr & FCR_FE != 0 {
            if !self.recv_fifo.push(byte) {
                self.lsr |= LSR_OE;
            }
            self.lsr |= LSR_DR;
            self.time_out();
        } else {
            if self.lsr & LSR_DR != 0 {
                self.lsr |= LSR_OE;
            }
            self.rbr = byte;
            self.lsr |= LSR_DR;
        }
        self.update_irq();
    }

    fn time_out(&mut self) {
        if self.recv_fifo.len() != 0 {
            self.timeout_ipending = 1;
        }
    }

    fn take_received(&mut self) -> u8 {
        let byte = if self.fcr & FCR_FE != 0 {
            let byte = self.recv_fifo.pop().unwrap_or(0);
            self.timeout_ipending = 0;
            if self.recv_fifo.len() == 0 {
                self.lsr &= !(LSR_DR | LSR_BI);
            } else {
                self.time_out();
            }
            byte
        } else {
            self.lsr &= !(LSR_DR | LSR_BI);
            self.rbr
        };
        self.update_irq();
        byte
    }

    fn transmit(&mut self, byte: u8) -> Option<u8> {
        self.thr = byte;
        self.tsr = byte;
        self.lsr |= LSR_THRE | LSR_TEMT;
        self.thr_ipending = 1;
        let looped = self.mcr & MCR_LOOP != 0;
        if looped {
            self.receive_one(byte);
        }
        self.update_irq();
        (!looped).then_some(byte)
    }

    fn write_ier(&mut self, value: u8) {
        let changed = self.ier ^ value;
        self.ier = value;
        if changed & IER_THRI != 0 {
            let idle = self.ier & IER_THRI != 0 && self.lsr & LSR_THRE != 0;
            self.thr_ipending = i32::from(idle);
        }
        if changed != 0 {
            self.update_irq();
        }
    }

    fn write_fcr(&mut self, value: u8) {
        let switched = (value ^ self.fcr) & FCR_FE != 0;
        if switched || value & FCR_RFR != 0 {
            self.lsr &= !(LSR_DR | LSR_BI);
            self.timeout_ipending = 0;
            self.recv_fifo = Fifo::default();
        }
        if switched || value & FCR_XFR != 0 {
            self.lsr |= LSR_THRE;
            self.thr_ipending = 1;
            self.xmit_fifo = Fifo::default();
        }
        self.set_fcr(value);
        self.update_irq();
    }

    fn set_fcr(&mut self, value: u8) {
        self.fcr = value & 0xc9;
        self.iir = if self.fcr & FCR_FE != 0 {
            self.iir | IIR_FE
        } else {
            self.iir & !IIR_FE
        };
    }

    /// Bytes in the receive FIFO that raise an interrupt.
    fn trigger_level(&self) -> usize {
        [1, 4, 8, 14][usize::from(self.fcr >> 6)]
    }

    fn update_irq(&mut self) {
        let is_ready = self.lsr & LSR_DR != 0
            && (self.fcr & FCR_FE == 0 || self.recv_fifo.len() >= self.trigger_level());
        let cause = if self.ier & IER_RLSI != 0 && self.lsr & LSR_INT_ANY != 0 {
            IIR_RLSI
        } else if self.ier & IER_RDI != 0 && self.timeout_ipending != 0 {
            IIR_CTI
        } else if self.ier & IER_RDI != 0 && is_ready {
            IIR_RDI
        } else if self.ier & IER_THRI != 0 && self.thr_ipending != 0 {
            IIR_THRI
        } else if self.ier & IER_MSI != 0 && self.msr & MSR_ANY_DELTA != 0 {
            IIR_MSI
        } else {
            IIR_NONE
        };
        self.iir = cause | self.iir & 0xf0;
    }
}

impl VmState for Uart {
    const NAME: &'static str = "serial";
    const VERSION: u32 = 3;
    const MINIMUM: u32 = 2;
    const SUBSECTIONS: &'static [Subsection<Self>] = &[
        Subsection {
            name: "serial/thr_ipending",
            version: 1,
            needed: |s| {
                let implied = s.iir & IIR_ID == IIR_THRI;
                s.ier & IER_THRI != 0 && (s.thr_ipending != 0) != implied
            },
            fields: |s, v| v.ranged("thr_ipending", &mut s.thr_ipending, 0..=1),
        },
        Subsection {
            name: "serial/tsr",
            version: 1,
            needed: |s| s.tsr_retry != 0,
            fields: |s, v| {
                v.ranged("tsr_retry", &mut s.tsr_retry, 0..=MAX_XMIT_RETRY)?;
                v.number("thr", &mut s.thr)?;
                v.number("tsr", &mut s.tsr)
            },
        },
        Subsection {
            name: "serial/recv_fifo",
            version: 1,
            needed: |s| s.recv_fifo.len() != 0,
            fields: |s, v| v.state("recv_fifo", &mut s.recv_fifo),
        },
        Subsection {
            name: "serial/xmit_fifo",
            version: 1,
            needed: |s| s.xmit_fifo.len() != 0,
            fields: |s, v| v.state("xmit_fifo", &mut s.xmit_fifo),
        },
        Subsection {
            name: "serial/fifo_timeout_timer",
            version: 1,
            needed: |s| s.fifo_timeout_timer != -1,
            fields: |s, v| v.timer("fifo_timeout_timer", &mut s.fifo_timeout_timer),
        },
        Subsection {
            name: "serial/timeout_ipending",
            version: 1,
            needed: |s| s.timeout_ipending != 0,
            fields: |s, v| v.number("timeout_ipending", &mut s.timeout_ipending),
        },
        Subsection {
            name: "serial/poll",
            version: 1,
            needed: |s| s.poll_msl >= 0,
            fields: |s, v| {
                v.number("poll_msl", &mut s.poll_msl)?;
                v.timer("modem_status_poll", &mut s.modem_status_poll)
            },
        },
    ];

    fn fields(&mut self, v: &mut dyn Visitor, version: u32) -> Result {
        v.number("divider", &mut self.divider)?;
        v.number("rbr", &mut self.rbr)?;
        v.number("ier", &mut self.ier)?;
        v.number("iir", &mut self.iir)?;
        v.number("lcr", &mut self.lcr)?;
        v.number("mcr", &mut self.mcr)?;
        v.number("lsr", &mut self.lsr)?;
        v.number("msr", &mut self.msr)?;
        v.number("scr", &mut self.scr)?;
        if version >= 3 {
            v.number("fcr_vmstate", &mut self.fcr)?;
        }
        Ok(())
    }

    fn loaded(&mut self) -> std::result::Result<(), String> {
        if self.thr_ipending == -1 {
            self.thr_ipending = i32::from(self.iir & IIR_ID == IIR_THRI);
        }
        let is_empty = self.lsr & LSR_TEMT != 0;
        let retry = self.tsr_retry;
        if retry > 0 && is_empty {
            return Err(format!(
                "inconsistent state in serial device (tsr not empty, tsr_retry={retry})"
            ));
        }
        if retry == 0 && !is_empty {
            return Err("inconsistent state in serial device (tsr empty, tsr_retry=0)".to_owned());
        }
        // There are no modem lines to poll here.
        self.poll_msl = -1;
        self.modem_status_poll = -1;
        self.set_fcr(self.fcr);
        Ok(())
    }
}

/// A ring of 16 bytes; QEMU's Fifo8.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Fifo {
    data: [u8; FIFO_SIZE],
    head: u32,
    num: u32,
}

impl Fifo {
    fn len(&self) -> usize {
        self.num as usize
    }

    /// Adds a byte, unless there is no room.
    fn push(&mut self, byte: u8) -> bool {
        let has_room = self.len() < FIFO_SIZE;
        if has_room {
            self.data[(self.head + self.num) as usize % FIFO_SIZE] = byte;
            self.num += 1;
        }
        has_room
    }

    fn pop(&mut self) -> Option<u8> {
        self.num = self.num.checked_sub(1)?;
        let byte = self.data[self.head as usize];
        self.head = (self.head + 1) % FIFO_SIZE as u32;
        Some(byte)
    }
}

impl VmState for Fifo {
    const NAME: &'static str = "Fifo8";
    const VERSION: u32 = 1;

    fn fields(&mut self, v: &mut dyn Visitor, _version: u32) -> Result {
        v.buffer("data", &mut self.data)?;
        v.ranged("head", &mut self.head, 0..=FIFO_SIZE as u32 - 1)?;
        v.ranged("num", &mut self.num, 0..=FIFO_SIZE as u32)
    }
}

/// QEMU gives up transmitting a byte after so many tries.
const MAX_XMIT_RETRY: u32 = 4;

const LCR_DLAB: u8 = 0x80;
const MCR_LOOP: u8 = 0x10;
const IER_MSI: u8 = 0x08;
const IER_RLSI: u8 = 0x04;
const IER_THRI: u8 = 0x02;
const IER_RDI: u8 = 0x01;
const IIR_NONE: u8 = 0x01;
/// Bits that tell the cause (the time-out's third bit is not among them).
const IIR_ID: u8 = 0x06;
const IIR_MSI: u8 = 0x00;
const IIR_THRI: u8 = 0x02;
const IIR_RDI: u8 = 0x04;
const IIR_RLSI: u8 = 0x06;
const IIR_CTI: u8 = 0x0c;
const IIR_FE: u8 = 0xc0;
const LSR_DR: u8 = 0x01;
const LSR_OE: u8 = 0x02;
const LSR_BI: u8 = 0x10;
const LSR_INT_ANY: u8 = 0x1e;
const LSR_THRE: u8 = 0x20;
const LSR_TEMT: u8 = 0x40;
const MSR_ANY_DELTA: u8 = 0x0f;
const FCR_FE: u8 = 0x01;
const FCR_RFR: u8 = 0x02;
const FCR_XFR: u8 = 0x04;

#[cfg(test)]
mod tests;
