# A kernel with a PVH entry, for tests: 64-bit code loaded at 2 MiB. It looks at what it was
# started with, wakes the second vCPU and then lives on the timers of both LAPICs. COM1's input comes
# by way of the I/O APIC, and is answered. Words of the command line:
#
#   alone     the second vCPU is left alone
#   x2apic    LAPICs are reached by MSRs
#   deadline  timers are armed by TSC deadline, one tick at a time
#
# Memory behind the image, all zero at the start (it would show if it were not):
#
#   0x201000  PML4   0x202000  page directory pointers   0x203000, 0x204000  page directories
#   0x207000  top of the boot vCPU's stack   0x208000  top of the other's
#   0x208000  timer ticks of each vCPU, 8 bytes
#   0x208010  words of the command line, a byte each: alone, x2apic, deadline
#   0x208014  bytes that came in, bytes that were answered, 4 bytes each
#   0x208020  the last 32 bytes that came in
#   0x210000  64 pages: the one of beacon n holds n - 64 before and n after it

    .set BASE, 0x200000
    .set PML4, 0x201000
    .set POINTERS, 0x202000
    .set LOW_GIGABYTE, 0x203000
    .set LAPIC_GIGABYTE, 0x204000
    .set STACKS, 0x207000
    .set TICKS, 0x208000
    .set ALONE, 0x208010
    .set X2APIC, 0x208011
    .set DEADLINE, 0x208012
    .set CAME, 0x208014
    .set ANSWERED, 0x208018
    .set INPUT, 0x208020
    .set PAGES, 0x210000
    .set TRAMPOLINE, 0x9000

    .set CODE64, 0x08
    .set DATA, 0x10
    .set CODE32, 0x18
    .set TIMER_VECTOR, 32
    .set SERIAL_VECTOR, 33
    .set PERIOD, 50000000
    .set DEADLINE_PERIOD, 100000000

    .set APIC_BASE, 0x1b
    .set X2APIC_MSRS, 0x800
    .set TSC_DEADLINE, 0x6e0
    .set IOAPIC, 0xfec00000
    .set COM1, 0x3f8

    .pushsection .rodata.hmpsh_kernel, "a", @progbits
    .balign 4096
    .globl hmpsh_test_kernel
    .hidden hmpsh_test_kernel
hmpsh_test_kernel:
    .code32
    jmp kernel.start32
    .org hmpsh_test_kernel - hmpsh_test_kernel + 8
kernel.gdt:
    .quad 0
    .quad 0x00af9b000000ffff
    .quad 0x00cf93000000ffff
    .quad 0x00cf9b000000ffff

kernel.start32:
    cli
    cld
    movl $STACKS, %esp
    movl $(POINTERS + 3), PML4
    movl $(LOW_GIGABYTE + 3), POINTERS
    movl $(LAPIC_GIGABYTE + 3), POINTERS + 24
    movl $LOW_GIGABYTE, %edi
    movl $0x83, %eax
    call kernel.map_gigabyte
    movl $0xc000009b, %eax              # not cached
    call kernel.map_gigabyte
    lgdtl BASE + (kernel.gdt_pointer - hmpsh_test_kernel)
    movw $DATA, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
kernel.long_mode:
    movl %cr4, %eax
    orl $0x20, %eax
    movl %eax, %cr4
    movl $PML4, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx
    rdmsr
    orl $0x100, %eax
    wrmsr
    movl %cr0, %eax
    orl $0x80000000, %eax
    movl %eax, %cr0
    ljmpl $CODE64, $(BASE + (kernel.start64 - hmpsh_test_kernel))

    # eax: first entry, edi: a directory; leaves edi at the next one.
kernel.map_gigabyte:
    movl $512, %ecx
1:  movl %eax, (%edi)
    addl $0x200000, %eax
    addl $8, %edi
    decl %ecx
    jnz 1b
    ret

    # Where the second vCPU wakes up, copied below 1 MiB.
    .code16
kernel.trampoline:
    cli
    movw %cs, %ax
    movw %ax, %ds
    lgdtl kernel.gdt_pointer - kernel.trampoline
    movl %cr0, %eax
    andl $0x9fffffff, %eax
    orl $1, %eax
    movl %eax, %cr0
    ljmpl $CODE32, $(BASE + (kernel.other32 - hmpsh_test_kernel))
    .balign 4
kernel.gdt_pointer:
    .short 4 * 8 - 1
    .long BASE + (kernel.gdt - hmpsh_test_kernel)
kernel.trampoline_end:
    .code32
kernel.other32:
    movw $DATA, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    jmp kernel.long_mode

    # Kept from here on: r15 the LAPIC, r14 this vCPU's number.
    .code64
kernel.start64:
    movl $0xfee00000, %r15d
    movl 0x20(%r15), %r14d
    shrl $24, %r14d
    movl %r14d, %esp
    shll $12, %esp
    addl $STACKS, %esp
    lidt kernel.idt_pointer(%rip)
    testl %r14d, %r14d
    jnz kernel.other
    movl %ebx, %ebp
    call kernel.words
    call kernel.start_apic
    movl $0x3f9, %edx                   # no serial interrupts
    xorl %eax, %eax
    outb %al, %dx
    leaq kernel.hello(%rip), %rsi
    call kernel.string

    # The start info: magic, version, memory map, command line.
    cmpl $0x336ec578, (%rbp)
    leaq kernel.no_magic(%rip), %rsi
    jne kernel.fault
    cmpl $1, 4(%rbp)
    jb kernel.fault
    movq 40(%rbp), %rdi
    movl 48(%rbp), %ecx
    leaq kernel.no_memory(%rip), %rsi
1:  subl $1, %ecx
    jb kernel.fault
    cmpl $1, 16(%rdi)                   # RAM
    jne 2f
    movq (%rdi), %rax
    cmpq $BASE, %rax
    ja 2f
    addq 8(%rdi), %rax
    cmpq $BASE, %rax
    ja 3f
2:  addq $24, %rdi
    jmp 1b
3:  leaq kernel.memory(%rip), %rsi
    call kernel.number
    leaq kernel.command_line(%rip), %rsi
    call kernel.string
    movq 24(%rbp), %rsi
    call kernel.string
    call kernel.end_line

    # COM1 interrupts by pin 4, an edge to this vCPU.
    movl $IOAPIC, %esi
    movl $0x19, (%rsi)
    movl $0, 0x10(%rsi)
    movl $0x18, (%rsi)
    movl $SERIAL_VECTOR, 0x10(%rsi)
    movl $(COM1 + 4), %edx
    movb $8, %al
    outb %al, %dx
    movl $(COM1 + 1), %edx
    movb $1, %al
    outb %al, %dx

    # The second vCPU.
    call kernel.arm
    cmpb $0, ALONE
    jne kernel.alone
    leaq kernel.trampoline(%rip), %rsi
    movl $TRAMPOLINE, %edi
    movl $(kernel.trampoline_end - kernel.trampoline), %ecx
    rep movsb
    movl $0x300, %ecx
    movl $0xc4500, %eax                 # INIT to all but this one
    call kernel.apic
    movl $20000, %ecx
1:  pause
    decl %ecx
    jnz 1b
    movl $0x300, %ecx
    movl $(0xc4600 + (TRAMPOLINE >> 12)), %eax
    call kernel.apic
    movl $1000000, %ecx
    leaq kernel.no_cpu(%rip), %rsi
1:  decl %ecx
    jz kernel.fault
    pause
    cmpq $0, TICKS + 8
    je 1b
    leaq kernel.cpu(%rip), %rsi
    call kernel.string

    # rbp: beacons, rbx: ticks seen.
kernel.alone:
    xorl %ebp, %ebp
    xorl %ebx, %ebx
kernel.live:
    sti
    hlt
    cli
    movl ANSWERED, %ecx
    cmpl %ecx, CAME
    je 1f
    incl ANSWERED
    andl $31, %ecx
    movzbl INPUT(%rcx), %eax
    call kernel.answer
1:  movq TICKS, %rax
    cmpq %rax, %rbx
    je kernel.live
    movq %rax, %rbx
    incq %rbp
    movl %ebp, %edi
    andl $63, %edi
    shll $12, %edi
    leaq -64(%rbp), %rax
    cmpq $64, %rbp
    ja 1f
    xorl %eax, %eax
1:  leaq kernel.no_page(%rip), %rsi
    cmpq %rax, PAGES(%rdi)
    jne kernel.fault
    movq %rbp, PAGES(%rdi)
    movq %rbp, %rax
    leaq kernel.beacon(%rip), %rsi
    call kernel.number
    movq TICKS + 8, %rax
    leaq kernel.ticks(%rip), %rsi
    call kernel.number
    jmp kernel.live

kernel.other:
    call kernel.start_apic
    call kernel.arm
    lock incq TICKS + 8
1:  sti
    hlt
    jmp 1b

    # Which words the command line has in it; rbp is the start info.
kernel.words:
    movq 24(%rbp), %rsi
1:  movl (%rsi), %eax
    cmpl $0x6e6f6c61, %eax              # "alon"
    jne 2f
    movb $1, ALONE
2:  cmpl $0x70613278, %eax              # "x2ap"
    jne 3f
    movb $1, X2APIC
3:  cmpl $0x64616564, %eax              # "dead"
    jne 4f
    movb $1, DEADLINE
4:  incq %rsi
    testb %al, %al
    jnz 1b
    ret

    # Switches this vCPU's LAPIC and its timer on, in the mode that is wanted.
kernel.start_apic:
    cmpb $0, X2APIC
    je 1f
    movl $APIC_BASE, %ecx
    rdmsr
    orl $0xc00, %eax
    wrmsr
1:  movl $0xf0, %ecx
    movl $0x12f, %eax                   # on, spurious vector 47
    call kernel.apic
    movl $0x350, %ecx
    movl $0x10000, %eax                 # LINT0 masked
    call kernel.apic
    movl $0x3e0, %ecx
    movl $0xb, %eax                     # timer by one
    call kernel.apic
    movl $0x320, %ecx
    movl $(0x20000 + TIMER_VECTOR), %eax
    cmpb $0, DEADLINE
    je kernel.apic
    movl $(0x40000 + TIMER_VECTOR), %eax

    # Writes eax to LAPIC register ecx; leaves neither, nor edx.
kernel.apic:
    cmpb $0, X2APIC
    jne 1f
    movl %eax, (%r15, %rcx)
    ret
1:  shrl $4, %ecx
    addl $X2APIC_MSRS, %ecx
    xorl %edx, %edx
    wrmsr
    ret

    # Starts the timer: its period, or the time of the next tick.
kernel.arm:
    movl $0x380, %ecx
    movl $PERIOD, %eax
    cmpb $0, DEADLINE
    je kernel.apic
    rdtsc
    addl $DEADLINE_PERIOD, %eax
    adcl $0, %edx
    movl $TSC_DEADLINE, %ecx
    wrmsr
    ret

kernel.timer:
    pushq %rax
    pushq %rcx
    pushq %rdx
    lock incq TICKS(, %r14, 8)
    cmpb $0, DEADLINE
    je kernel.end_of_interrupt
    call kernel.arm
kernel.end_of_interrupt:
    movl $0xb0, %ecx
    xorl %eax, %eax
    call kernel.apic
    popq %rdx
    popq %rcx
    popq %rax
kernel.spurious:
    iretq

kernel.serial:
    pushq %rax
    pushq %rcx
    pushq %rdx
1:  movl $(COM1 + 5), %edx
    inb %dx, %al
    testb $1, %al
    jz 2f
    movl $COM1, %edx
    inb %dx, %al
    movl CAME, %ecx
    andl $31, %ecx
    movb %al, INPUT(%rcx)
    incl CAME
    jmp 1b
2:  movl $(COM1 + 2), %edx
    inb %dx, %al
    testb $1, %al
    jz 1b
    jmp kernel.end_of_interrupt

kernel.trap:
    leaq kernel.trapped(%rip), %rsi
kernel.fault:
    call kernel.string
1:  cli
    hlt
    jmp 1b

    # The string at rsi, the number rax in decimal, an end of line.
kernel.number:
    pushq %rax
    call kernel.string
    popq %rax
    xorl %esi, %esi
    movl $10, %ecx
1:  xorl %edx, %edx
    divq %rcx
    pushq %rdx
    incl %esi
    testq %rax, %rax
    jnz 1b
2:  popq %rax
    addb $0x30, %al
    call kernel.byte
    decl %esi
    jnz 2b
kernel.end_line:
    movb $0x0a, %al
    jmp kernel.byte

    # Says which byte came in.
kernel.answer:
    pushq %rax
    leaq kernel.received(%rip), %rsi
    call kernel.string
    movl (%rsp), %eax
    shrl $4, %eax
    call kernel.digit
    popq %rax
    andl $15, %eax
    call kernel.digit
    jmp kernel.end_line

kernel.digit:
    leaq kernel.digits(%rip), %rcx
    movb (%rcx, %rax), %al
    jmp kernel.byte

kernel.string:
    movb (%rsi), %al
    testb %al, %al
    jz 1f
    incq %rsi
    call kernel.byte
    jmp kernel.string
1:  ret

kernel.byte:
    movb %al, %cl
    movl $0x3fd, %edx
1:  inb %dx, %al
    testb $0x20, %al
    jz 1b
    movb %cl, %al
    movl $0x3f8, %edx
    outb %al, %dx
    ret

kernel.hello:        .asciz "kernel\n"
kernel.memory:       .asciz "memory "
kernel.command_line: .asciz "command line "
kernel.cpu:          .asciz "cpu 1\n"
kernel.beacon:       .asciz "B "
kernel.ticks:        .asciz "C 1 "
kernel.received:     .asciz "R "
kernel.digits:       .ascii "0123456789abcdef"
kernel.no_magic:     .asciz "FAULT no start info\n"
kernel.no_memory:    .asciz "FAULT no memory where the kernel is\n"
kernel.no_cpu:       .asciz "FAULT cpu 1 does not start\n"
kernel.no_page:      .asciz "FAULT page\n"
kernel.trapped:      .asciz "FAULT trap\n"

    .balign 8
kernel.idt:
    .rept TIMER_VECTOR
    .short kernel.trap - hmpsh_test_kernel, CODE64, 0x8e00, BASE >> 16
    .quad 0
    .endr
    .short kernel.timer - hmpsh_test_kernel, CODE64, 0x8e00, BASE >> 16
    .quad 0
    .short kernel.serial - hmpsh_test_kernel, CODE64, 0x8e00, BASE >> 16
    .quad 0
    .skip 16 * 13
    .short kernel.spurious - hmpsh_test_kernel, CODE64, 0x8e00, BASE >> 16
    .quad 0
kernel.idt_pointer:
    .short 16 * 48 - 1
    .quad BASE + (kernel.idt - hmpsh_test_kernel)
    .org hmpsh_test_kernel - hmpsh_test_kernel + 0x1000
    .code64
    .popsection
