use super::*;
use crate::vmstate::{load, save};

fn moved(uart: &Uart) -> Uart {
    let bytes = save(&mut uart.clone()).unwrap();
    let mut again = Uart::incoming();
    let mut rest = &bytes[..];
    load(&mut again, 3, &mut rest).unwrap();
    assert!(rest.is_empty());
    again
}

#[test]
fn reset_state_is_qemus() {
    let bytes = save(&mut Uart::default()).unwrap();
    assert_eq!(bytes, [0, 0x0c, 0, 0, 1, 0, 8, 0x60, 0xb0, 0, 0]);
    assert_eq!(moved(&Uart::default()), Uart::default());
}

#[test]
fn transmit_interrupts_until_identified() {
    let mut uart = Uart::default();
    uart.write(1, IER_THRI);
    assert!(uart.irq());
    assert_eq!(uart.read(2), IIR_THRI);
    assert!(!uart.irq());
    assert_eq!(uart.write(0, b'x'), Some(b'x'));
    assert!(uart.irq());
    assert_eq!(uart.read(5), LSR_THRE | LSR_TEMT);
}

#[test]
fn fifo_overflow_is_refused_and_reading_drains() {
    let mut uart = Uart::default();
    uart.write(2, FCR_FE);
    uart.write(1, IER_RDI);
    assert_eq!(uart.receive(b"0123456789abcdefgh"), FIFO_SIZE);
    assert!(uart.irq());
    assert_eq!(uart.read(2) & 0x0f, IIR_CTI);
    let read: Vec<u8> = (0..FIFO_SIZE).map(|_| uart.read(0)).collect();
    assert_eq!(read, b"0123456789abcdef");
    assert!(!uart.irq());
    assert_eq!(uart.read(5) & LSR_DR, 0);
}

#[test]
fn without_fifo_one_byte_at_a_time() {
    let mut uart = Uart::default();
    uart.write(1, IER_RDI);
    assert_eq!(uart.receive(b"ab"), 1);
    assert_eq!(uart.room(), 0);
    assert_eq!(uart.read(2), IIR_RDI);
    assert_eq!(uart.read(0), b'a');
    assert_eq!(uart.room(), 1);
    assert!(!uart.irq());
}

#[test]
fn divisor_scratch_and_loopback() {
    let mut uart = Uart::default();
    uart.write(3, LCR_DLAB | 3);
    uart.write(0, 0x34);
    uart.write(1, 0x12);
    assert_eq!((uart.read(0), uart.read(1)), (0x34, 0x12));
    uart.write(3, 3);
    uart.write(7, 0x5a);
    assert_eq!(uart.read(7), 0x5a);
    uart.write(4, MCR_LOOP | 0x0f);
    assert_eq!(uart.read(6), 0xf0);
    assert_eq!(uart.write(0, b'q'), None);
    assert_eq!(uart.read(0), b'q');
}

#[test]
fn every_interesting_state_moves() {
    let mut uart = Uart::default();
    uart.write(2, FCR_FE | 0x40);
    uart.write(1, IER_RDI | IER_THRI);
    uart.receive(b"hello");
    assert_eq!(moved(&uart), uart);
    for _ in 0..5 {
        uart.read(0);
    }
    assert_eq!(
        Uart {
            recv_fifo: Fifo::default(),
            ..moved(&uart)
        },
        Uart {
            recv_fifo: Fifo::default(),
            thr: 0,
            tsr: 0,
            ..uart.clone()
        }
    );
    // Pending behind a receive interrupt: the identification register does not imply it.
    uart.receive(b"x");
    let mut again = moved(&uart);
    again.read(0);
    assert_eq!(again.read(2) & 0x0f, IIR_THRI);
}

#[test]
fn what_another_transmitter_held_is_sent() {
    let mut uart = Uart {
        lsr: LSR_THRE,
        tsr: b'1',
        tsr_retry: 2,
        fcr: FCR_FE,
        fifo_timeout_timer: 17,
        ..Uart::default()
    };
    uart.xmit_fifo.push(b'2');
    uart.recv_fifo.push(b'r');
    let mut again = moved(&uart);
    assert_eq!(again.settle(), b"12");
    assert_eq!(again.timeout_ipending, 1);
    assert_eq!(again.lsr, LSR_THRE | LSR_TEMT);
    assert!(again.settle().is_empty());
}

#[test]
fn inconsistent_states_are_refused() {
    for (lsr, retry) in [(LSR_THRE, 0), (LSR_THRE | LSR_TEMT, 3)] {
        let bytes = save(&mut Uart {
            lsr,
            tsr_retry: retry,
            ..Uart::default()
        })
        .unwrap();
        let error = load(&mut Uart::incoming(), 3, &mut &bytes[..])
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("inconsistent state in serial device"),
            "{error}"
        );
    }
    let mut fifo = Uart {
        lsr: LSR_TEMT,
        ..Uart::default()
    };
    fifo.recv_fifo.num = 17;
    let bytes = save(&mut fifo).unwrap();
    let error = load(&mut Uart::incoming(), 3, &mut &bytes[..])
        .unwrap_err()
        .to_string();
    assert_eq!(
        error,
        "serial.serial/recv_fifo.recv_fifo: field 'num' is 0x11, legal is 0x0 to 0x10"
    );
}
