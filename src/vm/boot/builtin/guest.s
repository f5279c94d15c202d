# The built-in guest: 64 KiB that end at 4 GiB and, again, at 1 MiB.
#
#   0x0000  parameters, patched by builtin.rs (its PARAMETERS say the same)
#   0x0200  tables and code
#   0x1000  where a start-up IPI (vector 0xf1) sends the other vCPUs; then disk.s
#   0xfff0  where a vCPU wakes up after reset (end.s)
#
# All code runs from the copy below 1 MiB, so an address is 0xf0000 plus an offset in the image.
# Guest RAM below 1 MiB:
#
#   0x0600  shared bytes: line lock, fault flag, one ready flag per vCPU
#   0x1000  PML4    0x2000  page directory pointers    0x10000...  page directories, at most 67
#   0x4000  stacks, 1 KiB per vCPU
#   0x8000  what a vCPU knows of its slice, 256 bytes per vCPU (CPU_*)
#   0x58000...  the disk's (disk.s)
#
# Integers only, and few of them: some hosts interpret guests, without a floating-point unit.
# Registers that keep their meaning in the loop: rbx vCPU, rbp its CPU_* block, r8 the page after
# its slice, r9 the hash's factor, r12 the sequence number of the next page (from bit 24 on), r13
# its page number, rdi its address, r14 pages in the slice (from bit 24 on), r15 the LAPIC.

    .set LOW, 0xf0000

    .set LINE_LOCK, 0x600
    .set FAULTED, 0x601
    .set READY, 0x610
    .set PML4, 0x1000
    .set POINTERS, 0x2000
    .set STACKS, 0x4000
    .set CPUS, 0x8000
    .set DIRECTORIES, 0x10000

    .set CPU_FIRST, 0          # first page of the slice
    .set CPU_COUNTDOWN, 8      # ticks until the next beacon
    .set CPU_BEACON, 16        # last beacon printed
    .set CPU_TICKS, 24         # ticks since boot
    .set CPU_SHOWN, 32         # vCPU whose ticks were printed last

    .set CODE64, 0x08
    .set DATA, 0x10
    .set CODE32, 0x18

    # The timer's is the higher one: a busy disk does not keep it waiting.
    .set DISK_VECTOR, 32
    .set TIMER_VECTOR, 33
    .set SPURIOUS_VECTOR, 47
    .set MASKED, 0x10000

    .set APIC_ID, 0x20
    .set APIC_TPR, 0x80
    .set APIC_EOI, 0xb0
    .set APIC_SPURIOUS, 0xf0
    .set APIC_ICR, 0x300
    .set APIC_ICR_TO, 0x310
    .set APIC_TIMER, 0x320
    .set APIC_LINT0, 0x350
    .set APIC_INITIAL, 0x380
    .set APIC_CURRENT, 0x390
    .set APIC_DIVIDE, 0x3e0

    .set COM1, 0x3f8
    .set LSR, COM1 + 5

    # One record: sequence number and page number in one word, and a hash of it. It stands at a
    # page's start, at its end, and at one of 64 places between, which its hash chooses.
    .set RECORD, 16
    .set LAST, 4096 - RECORD
    .set MOVES, 0xfc0
    .set NEXT, 1 << 24

    # Pages from one look at the stopwatch to the next: a batch that is too large for the host
    # ends with its period.
    .set LOOKS, 16

    .pushsection .rodata.hmpsh_guest, "a", @progbits
    .balign 4096
    .globl hmpsh_guest_image
    .hidden hmpsh_guest_image
hmpsh_guest_image:
guest.base:         .quad 0
guest.pages:        .quad 0
guest.batch:        .quad 0
guest.period:       .quad 0
guest.beacon:       .quad 0
guest.vcpus:        .quad 0
guest.disk:         .quad 0
guest.request:      .quad 0
guest.depth:        .quad 0
guest.banner:       .skip 0x200 - 72

    .balign 8
guest.gdt:
    .quad 0
    .quad 0x00af9b000000ffff
    .quad 0x00cf93000000ffff
    .quad 0x00cf9b000000ffff
guest.gdt_pointer:
    .short 4 * 8 - 1
    .long guest.gdt - hmpsh_guest_image + LOW

    .balign 8
guest.idt:
    .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    .short guest.traps - hmpsh_guest_image + 16 * \n, CODE64, 0x8e00, LOW >> 16
    .quad 0
    .endr
    .short guest.disk_interrupt - hmpsh_guest_image, CODE64, 0x8e00, LOW >> 16
    .quad 0
    .short guest.timer - hmpsh_guest_image, CODE64, 0x8e00, LOW >> 16
    .quad 0
    .skip 16 * (SPURIOUS_VECTOR - TIMER_VECTOR - 1)
    .short guest.spurious - hmpsh_guest_image, CODE64, 0x8e00, LOW >> 16
    .quad 0
guest.idt_pointer:
    .short 16 * (SPURIOUS_VECTOR + 1) - 1
    .quad guest.idt - hmpsh_guest_image + LOW

    .code16
guest.start16:
    cli
    cld
    movw $(LOW >> 4), %ax
    movw %ax, %ds
    lgdtl guest.gdt_pointer - hmpsh_guest_image
    movl %cr0, %eax
    andl $0x9fffffff, %eax              # caches on
    orl $1, %eax
    movl %eax, %cr0
    ljmpl $CODE32, $(guest.start32 - hmpsh_guest_image + LOW)

    .code32
guest.start32:
    movw $DATA, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movl $0x1b, %ecx
    rdmsr
    testl $0x100, %eax                  # the boot processor?
    jz guest.long_mode

    # Page tables: 2 MiB pages, one to one, for the gigabytes that are used.
    movl $(STACKS + 0x400), %esp
    movl $PML4, %edi
    xorl %eax, %eax
    movl $(0x2000 / 4), %ecx
    rep stosl
    movl $(POINTERS + 3), PML4
    movl $DIRECTORIES, %edi
    xorl %ebx, %ebx
    movl $0x83, %esi
    call guest.map_gigabyte
    movl $3, %ebx                       # the LAPIC: not cached
    movl $0x9b, %esi
    call guest.map_gigabyte
    movl (guest.base - hmpsh_guest_image + LOW), %eax
    movl (guest.base - hmpsh_guest_image + LOW + 4), %edx
    movl %eax, %ebx
    shrdl $30, %edx, %ebx
    # The last byte: base + pages * 4096 - 1.
    movl (guest.pages - hmpsh_guest_image + LOW), %ecx
    movl %ecx, %ebp
    shll $12, %ecx
    shrl $20, %ebp
    addl %ecx, %eax
    adcl %ebp, %edx
    subl $1, %eax
    sbbl $0, %edx
    movl %eax, %ebp
    shrdl $30, %edx, %ebp
1:  movl $0x83, %esi
    call guest.map_gigabyte
    incl %ebx
    cmpl %ebp, %ebx
    jbe 1b

guest.long_mode:
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
    ljmpl $CODE64, $(guest.start64 - hmpsh_guest_image + LOW)

    # ebx: gigabyte, esi: flags of its entries, edi: next free directory.
guest.map_gigabyte:
    cmpl $0, POINTERS(,%ebx,8)
    jne 2f
    leal 3(%edi), %eax
    movl %eax, POINTERS(,%ebx,8)
    movl %ebx, %edx
    shrl $2, %edx
    movl %ebx, %eax
    shll $30, %eax
    orl %esi, %eax
    movl $512, %ecx
1:  movl %eax, (%edi)
    movl %edx, 4(%edi)
    addl $0x200000, %eax
    addl $8, %edi
    decl %ecx
    jnz 1b
2:  ret

    .code64
guest.start64:
    movl $0xfee00000, %r15d
    movl APIC_ID(%r15), %ebx
    shrl $24, %ebx
    movl %ebx, %esp
    shll $10, %esp
    addl $(STACKS + 0x400), %esp
    movl %ebx, %ebp
    shll $8, %ebp
    addl $CPUS, %ebp
    lidt guest.idt_pointer(%rip)
    movl $(0x100 + SPURIOUS_VECTOR), APIC_SPURIOUS(%r15)
    movl $0, APIC_TPR(%r15)
    movl $MASKED, APIC_LINT0(%r15)
    movl $0xb, APIC_DIVIDE(%r15)        # by one: KVM and QEMU count nanoseconds
    testl %ebx, %ebx
    jnz guest.slice

    movl $LINE_LOCK, %edi
    xorl %eax, %eax
    movl $(0x100 / 8), %ecx
    rep stosq
    movl $CPUS, %edi
    movl $(16 * 0x100 / 8), %ecx
    rep stosq
    movb $0xff, %al                     # a PIC, where there is one, has nothing to say
    outb %al, $0x21
    outb %al, $0xa1
    movl $(COM1 + 1), %edx              # no serial interrupts
    xorl %eax, %eax
    outb %al, %dx
    movl $(COM1 + 2), %edx              # FIFO on
    movb $1, %al
    outb %al, %dx
    movl $(COM1 + 3), %edx              # 8 bits, no parity
    movb $3, %al
    outb %al, %dx
    movl $(COM1 + 4), %edx              # DTR, RTS
    outb %al, %dx
    leaq guest.banner(%rip), %rsi
    call guest.text
    call guest.disk_open
    movl $1, CPU_COUNTDOWN(%rbp)
    call guest.wake_others

guest.slice:
    # vCPU i of n walks pages i*(pages/n)...; the last one takes what is left over.
    movb $1, READY(%rbx)
    movq guest.pages(%rip), %rax
    xorl %edx, %edx
    divq guest.vcpus(%rip)
    movq %rax, %r13
    imulq %rbx, %r13
    leaq (%r13, %rax), %rcx
    leaq 1(%rbx), %rdx
    cmpq guest.vcpus(%rip), %rdx
    jb 1f
    movq guest.pages(%rip), %rcx
1:  movq %r13, CPU_FIRST(%rbp)
    movq %rcx, %r8
    movq %rcx, %r14
    subq %r13, %r14
    shlq $24, %r14
    movq %r13, %rdi
    shlq $12, %rdi
    addq guest.base(%rip), %rdi
    movl $NEXT, %r12d
    movabsq $0x9e3779b97f4a7c15, %r9

guest.tick:
    cmpb $0, FAULTED
    jne guest.stop
    movl $(MASKED + TIMER_VECTOR), APIC_TIMER(%r15)
    movl $0xffffffff, APIC_INITIAL(%r15)        # a stopwatch
    movq guest.batch(%rip), %r11

guest.page:
    movq %r12, %rax
    subq %r14, %rax                     # sequence number of the last visit
    jbe guest.write                     # there was none
    orq %r13, %rax
    movq %rax, %rcx
    imulq %r9, %rcx
    movq %rcx, %rdx
    shrq $32, %rdx
    xorq %rdx, %rcx
    xorl %edx, %edx
    cmpq %rax, (%rdi)
    jne guest.fault
    cmpq %rcx, 8(%rdi)
    jne guest.fault
    movl $LAST, %edx
    cmpq %rax, LAST(%rdi)
    jne guest.fault
    cmpq %rcx, LAST + 8(%rdi)
    jne guest.fault
    movl %ecx, %edx
    andl $MOVES, %edx
    addl $RECORD * 2, %edx
    cmpq %rax, (%rdi, %rdx)
    jne guest.fault
    cmpq %rcx, 8(%rdi, %rdx)
    jne guest.fault
guest.write:
    movq %r12, %rax
    orq %r13, %rax
    movq %rax, %rcx
    imulq %r9, %rcx
    movq %rcx, %rdx
    shrq $32, %rdx
    xorq %rdx, %rcx
    movl %ecx, %edx
    andl $MOVES, %edx
    movq %rax, (%rdi)
    movq %rcx, 8(%rdi)
    movq %rax, LAST(%rdi)
    movq %rcx, LAST + 8(%rdi)
    movq %rax, RECORD * 2(%rdi, %rdx)
    movq %rcx, RECORD * 2 + 8(%rdi, %rdx)
    addq $NEXT, %r12
    incq %r13
    addq $4096, %rdi
    cmpq %r8, %r13
    jb 1f
    movq CPU_FIRST(%rbp), %r13
    movq %r13, %rdi
    shlq $12, %rdi
    addq guest.base(%rip), %rdi
1:  decq %r11
    jz 1f
    testb $(LOOKS - 1), %r11b           # a look at the stopwatch is expensive
    jnz guest.page
    movl APIC_CURRENT(%r15), %ecx
    notl %ecx
    cmpq guest.period(%rip), %rcx
    jb guest.page
1:
    incq CPU_TICKS(%rbp)
    testl %ebx, %ebx
    jnz guest.rest
    call guest.disk_tick
    call guest.answer
    decq CPU_COUNTDOWN(%rbp)
    jnz guest.rest
    movq guest.beacon(%rip), %rax
    movq %rax, CPU_COUNTDOWN(%rbp)
    call guest.say_beacon
    call guest.say_disk

guest.rest:
    # Rest until the period is over, and at least as long as the work took, which is hardly longer
    # than a period. Time in which the guest stood still counts as work: hence the bound. A
    # stopwatch that stands at zero came through a migration.
    movl APIC_CURRENT(%r15), %ecx
    movq guest.period(%rip), %rax
    testl %ecx, %ecx
    jz 2f
    notl %ecx
    leaq (,%rax,8), %rdx
    cmpq %rdx, %rcx
    cmovaq %rdx, %rcx
    subq %rcx, %rax
    cmpq %rcx, %rax
    cmovlq %rcx, %rax
2:  movl $TIMER_VECTOR, APIC_TIMER(%r15)
    movl %eax, APIC_INITIAL(%r15)
    sti
guest.halt:
    hlt
    cli
    jmp guest.tick

    # Page r13, or what r8 says, does not hold what was written: it is at rdi, edx is where in it, rax
    # and rcx what was expected.
guest.fault:
    leaq guest.fault_page(%rip), %r8
guest.fault_record:
    movb $1, FAULTED
    leaq (%rdi, %rdx), %rbp
    movq %rax, %r10
    movq %rcx, %r11
    movq %rdx, %r14
    call guest.lock
    movq %r8, %rsi
    call guest.string
    movq %r13, %rax
    call guest.decimal
    leaq guest.fault_offset(%rip), %rsi
    call guest.string
    movq %r14, %rax
    call guest.decimal
    leaq guest.fault_expected(%rip), %rsi
    call guest.string
    movq %r10, %rax
    call guest.hexadecimal
    movb $0x20, %al
    call guest.byte
    movq %r11, %rax
    call guest.hexadecimal
    leaq guest.fault_found(%rip), %rsi
    call guest.string
    movq (%rbp), %rax
    call guest.hexadecimal
    movb $0x20, %al
    call guest.byte
    movq 8(%rbp), %rax
    call guest.hexadecimal
    call guest.end_line
guest.stop:
    cli
    hlt
    jmp guest.stop

    # An exception: its number, error code and place are on the stack.
guest.trap:
    movb $1, FAULTED
    call guest.lock
    leaq guest.fault_trap(%rip), %rsi
    call guest.string
    popq %rax
    call guest.decimal
    leaq guest.fault_error(%rip), %rsi
    call guest.string
    popq %rax
    call guest.hexadecimal
    leaq guest.fault_at(%rip), %rsi
    call guest.string
    popq %rax
    call guest.hexadecimal
    call guest.end_line
    jmp guest.stop

    # The timer runs once and wakes the guest once. A processor lets no interrupt in between STI
    # and HLT, but not every host that interprets guests keeps that, and migrations lose it (the
    # timer may be due the moment the guest is loaded): who was about to halt then halts no more.
    # The disk's interrupt sends it back to HLT, and so must not come between here and CLI.
guest.timer:
    movl $0, APIC_EOI(%r15)
    movw $(guest.halt - hmpsh_guest_image + 1), (%rsp)
    andb $0xfd, 17(%rsp)
guest.spurious:
    iretq

    # Starts vCPUs 1 to vcpus-1, one after the other.
guest.wake_others:
    movl $1, %r13d
1:  cmpq guest.vcpus(%rip), %r13
    jae 4f
    movl %r13d, %eax
    shll $24, %eax
    movl %eax, APIC_ICR_TO(%r15)
    movl $0x4500, APIC_ICR(%r15)        # INIT
    movl $10000000, %eax
    call guest.wait
    movl %r13d, %eax
    shll $24, %eax
    movl %eax, APIC_ICR_TO(%r15)
    movl $0x46f1, APIC_ICR(%r15)        # start at 0xf1000
    movl $2000, %r12d
2:  cmpb $0, READY(%r13)
    jne 3f
    movl $1000000, %eax
    call guest.wait
    decl %r12d
    jnz 2b
    movb $1, FAULTED
    call guest.lock
    leaq guest.fault_cpu(%rip), %rsi
    call guest.string
    movq %r13, %rax
    call guest.decimal
    leaq guest.fault_start(%rip), %rsi
    call guest.string
    call guest.end_line
    jmp guest.stop
3:  incl %r13d
    jmp 1b
4:  ret

    # Waits eax nanoseconds.
guest.wait:
    movl $(MASKED + TIMER_VECTOR), APIC_TIMER(%r15)
    movl %eax, APIC_INITIAL(%r15)
1:  pause
    cmpl $0, APIC_CURRENT(%r15)
    jne 1b
    ret

    # B <n>, and with several vCPUs the ticks of one other, in turn. Keeps rdi, r8, r9, r11 to r15.
guest.say_beacon:
    call guest.lock
    movb $0x42, %al
    call guest.byte
    movb $0x20, %al
    call guest.byte
    movq CPU_BEACON(%rbp), %rax
    incq %rax
    movq %rax, CPU_BEACON(%rbp)
    call guest.decimal
    call guest.end_line
    movq CPU_SHOWN(%rbp), %r10
    incq %r10
    cmpq guest.vcpus(%rip), %r10
    jb 1f
    movl $1, %r10d
    cmpq $1, guest.vcpus(%rip)
    je 2f
1:  movq %r10, CPU_SHOWN(%rbp)
    call guest.lock
    movb $0x43, %al
    call guest.byte
    movb $0x20, %al
    call guest.byte
    movq %r10, %rax
    call guest.decimal
    movb $0x20, %al
    call guest.byte
    shlq $8, %r10
    movq CPUS + CPU_TICKS(%r10), %rax
    call guest.decimal
    call guest.end_line
2:  ret

    # R <hex> for each byte that came in.
guest.answer:
    movl $LSR, %edx
    inb %dx, %al
    cmpb $0xff, %al
    je 1f
    testb $1, %al
    jz 1f
    movl $COM1, %edx
    inb %dx, %al
    movzbl %al, %r10d
    call guest.lock
    movb $0x52, %al
    call guest.byte
    movb $0x20, %al
    call guest.byte
    movl %r10d, %eax
    movl $2, %esi
    shlq $56, %rax
    call guest.digits
    call guest.end_line
    jmp guest.answer
1:  ret

    # Output. All of it keeps rbx, rbp, rdi and r8 to r15.

    # Takes the line lock; a lock that is never let go (a trap while printing) is passed by.
guest.lock:
    movl $100000, %ecx
1:  movb $1, %al
    xchgb %al, LINE_LOCK
    testb %al, %al
    jz 2f
    pause
    decl %ecx
    jnz 1b
2:  ret

    # The string at rsi as a line of its own.
guest.text:
    call guest.lock
    call guest.string
guest.end_line:
    movb $0x0a, %al
    call guest.byte
    movb $0, LINE_LOCK
    ret

guest.string:
    movb (%rsi), %al
    testb %al, %al
    jz 1f
    incq %rsi
    call guest.byte
    jmp guest.string
1:  ret

guest.decimal:
    xorl %esi, %esi
    movl $10, %ecx
1:  xorl %edx, %edx
    divq %rcx
    addb $0x30, %dl
    pushq %rdx
    incl %esi
    testq %rax, %rax
    jnz 1b
2:  popq %rax
    call guest.byte
    decl %esi
    jnz 2b
    ret

guest.hexadecimal:
    movl $16, %esi
    # The first esi hexadecimal digits of rax.
guest.digits:
    rolq $4, %rax
    pushq %rax
    andb $15, %al
    addb $0x30, %al
    cmpb $0x39, %al
    jbe 1f
    addb $0x27, %al
1:  call guest.byte
    popq %rax
    decl %esi
    jnz guest.digits
    ret

    # One byte, al, as soon as the port takes it; without a port (reads of ones) it is lost, and
    # a port that never gets ready is not waited for for ever.
guest.byte:
    pushq %rax
    movl $LSR, %edx
    movl $4096, %ecx
1:  inb %dx, %al
    cmpb $0xff, %al
    je 3f
    testb $0x20, %al
    jnz 2f
    pause
    decl %ecx
    jnz 1b
2:  popq %rax
    movl $COM1, %edx
    outb %al, %dx
    ret
3:  popq %rax
    ret

guest.fault_page:       .asciz "FAULT page "
guest.fault_offset:     .asciz " offset "
guest.fault_expected:   .asciz " expected "
guest.fault_found:      .asciz " found "
guest.fault_trap:       .asciz "FAULT trap "
guest.fault_error:      .asciz " error "
guest.fault_at:         .asciz " at "
guest.fault_cpu:        .asciz "FAULT cpu "
guest.fault_start:      .asciz " does not start"

    .balign 16
guest.traps:
    .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    .balign 16
    .if (\n != 8) && (\n != 10) && (\n != 11) && (\n != 12) && (\n != 13) && (\n != 14) && (\n != 17)
    pushq $0
    .endif
    pushq $\n
    jmp guest.trap
    .endr

    .code16
    .org hmpsh_guest_image - hmpsh_guest_image + 0x1000
    ljmpw $(LOW >> 4), $(guest.start16 - hmpsh_guest_image)

    .code64
