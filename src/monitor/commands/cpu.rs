//! `cpu`, `info cpus`, `info registers`.

use crate::control::CpuInfo;
use crate::monitor::args::Args;
use crate::monitor::registers;
use crate::monitor::session::{Error, Session};

/// `cpu index`.
pub(crate) fn cpu(session: &mut Session, args: &Args) -> Result<(), Error> {
    let index = usize::try_from(args.int("index")?).unwrap_or(usize::MAX);
    if index >= session.control.cpus().len() {
        return Err(Error::Text("invalid CPU index".to_owned()));
    }
    session.cpu = index;
    Ok(())
}

/// `info cpus`.
pub(crate) fn info_cpus(session: &mut Session, _: &Args) -> Result<(), Error> {
    let text = cpus(&session.control.cpus(), session.cpu);
    session.print(&text);
    Ok(())
}

/// `info registers [-a|vcpu]`.
pub(crate) fn info_registers(session: &mut Session, args: &Args) -> Result<(), Error> {
    let count = session.control.cpus().len();
    let chosen = match args.int_if_any("vcpu") {
        _ if args.flag("cpustate_all") => 0..count,
        None => session.cpu..session.cpu + 1,
        Some(index) => match usize::try_from(index) {
            Ok(index) if index < count => index..index + 1,
            _ => return Err(Error::Text(format!("CPU#{index} not available"))),
        },
    };
    for index in chosen {
        let registers = session.control.registers(index)?;
        session.print(&format!("\nCPU#{index}\n{}", registers::dump(&registers)));
    }
    Ok(())
}

fn cpus(cpus: &[CpuInfo], default: usize) -> String {
    cpus.iter()
        .map(|cpu| {
            let mark = if cpu.index == default { '*' } else { ' ' };
            format!("{mark} CPU #{}: thread_id={}\n", cpu.index, cpu.thread)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_the_default() {
        let list = [
            CpuInfo {
                index: 0,
                thread: 77,
            },
            CpuInfo {
                index: 1,
                thread: 78,
            },
        ];
        assert_eq!(
            cpus(&list, 1),
            "  CPU #0: thread_id=77\n* CPU #1: thread_id=78\n"
        );
    }
}
