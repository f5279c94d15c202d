# A kernel with a PVH entry, for tests: 32-bit code loaded at 2 MiB that lives on the disk in slot
# 7 and on its interrupts. Each round it writes two sectors and, in the same batch, reads back what
# it wrote a while ago; every 16th round flushes. It takes the slot's interface as it finds it: by the
# present one the descriptors lie where the legacy layout would not have them.
#
# Memory behind the image:
#
#   0x202000  top of the stack
#   0x210000  descriptors, 16; the available ring follows them, the used ring is at 0x211000
#   0x212000  headers of write, read and flush, 16 bytes each; their status bytes at 0x212040
#   0x212100  the table of the read request
#   0x213000  what is written   0x214000  what was read
#   0x215000  descriptors once more, for the present interface

    .set disk.BASE, 0x200000
    .set disk.STACK, 0x202000
    .set disk.RING, 0x210000
    .set disk.AVAIL, 0x210100
    .set disk.USED, 0x211000
    .set disk.HEADERS, 0x212000
    .set disk.STATUS, 0x212040
    .set disk.TABLE, 0x212100
    .set disk.WRITTEN, 0x213000
    .set disk.READ, 0x214000
    .set disk.APART, 0x215000
    .set disk.WORDS, 256
    .set disk.PLACES, 64
    .set disk.VECTOR, 0x30

    .pushsection .rodata.hmpsh_disk_kernel, "a", @progbits
    .balign 4096
    .globl hmpsh_disk_kernel
    .hidden hmpsh_disk_kernel
hmpsh_disk_kernel:
    .code32
    jmp disk.start
    .org hmpsh_disk_kernel - hmpsh_disk_kernel + 8
disk.gdt:
    .quad 0
    .quad 0x00cf9b000000ffff
    .quad 0x00cf93000000ffff

disk.start:
    cli
    cld
    lgdtl disk.BASE + (disk.gdt_pointer - hmpsh_disk_kernel)
    ljmpl $8, $(disk.BASE + (disk.flat - hmpsh_disk_kernel))
disk.flat:
    movw $16, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movl $disk.STACK, %esp
    lidtl disk.BASE + (disk.idt_pointer - hmpsh_disk_kernel)
    movl $0x3f9, %edx                   # no serial interrupts
    xorl %eax, %eax
    outb %al, %dx
    movl $0x12f, 0xfee000f0             # LAPIC on, spurious vector 47
    movl $0x10000, 0xfee00350           # LINT0 masked
    movl $0x29, 0xfec00000              # line 12, to the first vCPU
    movl $0, 0xfec00010
    movl $0x28, 0xfec00000
    movl $disk.VECTOR, 0xfec00010

    # ebx: the slot
    movl $0xfeb00e00, %ebx
    movl $(disk.BASE + (disk.no_disk - hmpsh_disk_kernel)), %esi
    cmpl $0x74726976, (%ebx)
    jne disk.fault
    cmpl $2, 8(%ebx)
    jne disk.fault
    movl $0, 0x70(%ebx)
    movl $3, 0x70(%ebx)
    cmpl $2, 4(%ebx)
    je disk.modern
    cmpl $1, 4(%ebx)
    jne disk.fault
    movl $4096, 0x28(%ebx)
    movl $0, 0x14(%ebx)
    movl 0x10(%ebx), %eax
    andl $0x30006e54, %eax              # what Linux takes
    movl %eax, %ebp
    movl $0, 0x24(%ebx)
    movl %eax, 0x20(%ebx)
    movl $0, 0x30(%ebx)
    movl $(disk.BASE + (disk.no_queue - hmpsh_disk_kernel)), %esi
    cmpl $16, 0x34(%ebx)
    jb disk.fault
    cmpl $0, 0x40(%ebx)
    jne disk.fault
    movl $16, 0x38(%ebx)
    movl $4096, 0x3c(%ebx)
    movl $(disk.RING >> 12), 0x40(%ebx)
    movl $7, 0x70(%ebx)
    movl $(disk.BASE + (disk.hello - hmpsh_disk_kernel)), %esi
    jmp disk.work

disk.modern:
    movl $1, 0x14(%ebx)                 # features from 32 on: the interface itself, alone
    testl $1, 0x10(%ebx)
    jz disk.fault
    movl $1, 0x24(%ebx)
    movl $1, 0x20(%ebx)
    movl $0, 0x14(%ebx)
    movl 0x10(%ebx), %eax
    andl $0x30006e54, %eax
    movl %eax, %ebp
    movl $0, 0x24(%ebx)
    movl %eax, 0x20(%ebx)
    movl $11, 0x70(%ebx)
    cmpl $11, 0x70(%ebx)
    jne disk.fault
    movl $0, 0x30(%ebx)
    movl $(disk.BASE + (disk.no_queue - hmpsh_disk_kernel)), %esi
    cmpl $16, 0x34(%ebx)
    jb disk.fault
    cmpl $0, 0x44(%ebx)
    jne disk.fault
    movl $16, 0x38(%ebx)
    movl $disk.APART, 0x80(%ebx)
    movl $0, 0x84(%ebx)
    movl $disk.AVAIL, 0x90(%ebx)
    movl $0, 0x94(%ebx)
    movl $disk.USED, 0xa0(%ebx)
    movl $0, 0xa4(%ebx)
    movl $1, 0x44(%ebx)
    cmpl $1, 0x44(%ebx)
    jne disk.fault
    movl $15, 0x70(%ebx)
    movl $(disk.BASE + (disk.hello_modern - hmpsh_disk_kernel)), %esi

disk.work:
    movl %ebp, %eax
    call disk.number

    # Write: 0 header, 1 data, 2 status. Read: 3, a table of the same. Flush: 4 header, 5 status.
    movl $(disk.BASE + (disk.descriptors - hmpsh_disk_kernel)), %esi
    movl $disk.APART, %edi
    movl $(16 * 6 / 4), %ecx
    rep movsl
    movl $(disk.BASE + (disk.descriptors - hmpsh_disk_kernel)), %esi
    movl $disk.RING, %edi
    movl $(16 * 6 / 4), %ecx
    rep movsl
    movl $disk.TABLE, %edi
    movl $(16 * 3 / 4), %ecx
    rep movsl
    movl $1, disk.HEADERS
    movl $0, disk.HEADERS + 16
    movl $4, disk.HEADERS + 32

    # ebp: the round, from 0 on
    xorl %ebp, %ebp
disk.round:
    movl $disk.WRITTEN, %edi
    movl %ebp, %eax
    call disk.pattern
1:  movl %eax, (%edi)
    addl $4, %edi
    incl %eax
    decl %ecx
    jnz 1b
    movl %ebp, %eax
    call disk.sector
    movl %eax, disk.HEADERS + 8

    # What was written 63 rounds ago, or in the round before.
    movl $63, %eax
    cmpl %eax, %ebp
    jae 1f
    movl $1, %eax
1:  movl %ebp, %edx
    subl %eax, %edx
    pushl %edx
    movl %edx, %eax
    call disk.sector
    movl %eax, disk.HEADERS + 24
    movl $0xffffffff, disk.STATUS

    # Into the available ring: heads 0, 3, every 16th time 4.
    movzwl disk.AVAIL + 2, %eax
    movl %eax, %ecx
    andl $15, %ecx
    movw $0, disk.AVAIL + 4(, %ecx, 2)
    incl %eax
    movl %eax, %ecx
    andl $15, %ecx
    movw $3, disk.AVAIL + 4(, %ecx, 2)
    incl %eax
    testl $15, %ebp
    jnz 1f
    movl %eax, %ecx
    andl $15, %ecx
    movw $4, disk.AVAIL + 4(, %ecx, 2)
    incl %eax
    # The one interrupt that is asked for is the last one's.
1:  leal -1(%eax), %ecx
    movw %cx, disk.AVAIL + 4 + 32
    movw %ax, disk.AVAIL + 2
    lock orl $0, (%esp)
    movl $0, 0x50(%ebx)
disk.wait:
    cli
    cmpw %ax, disk.USED + 2
    je 3f
    sti
    hlt
    jmp disk.wait
3:  movl $(disk.BASE + (disk.no_status - hmpsh_disk_kernel)), %esi
    cmpw $0, disk.STATUS
    jne disk.fault
    testl $15, %ebp
    jnz 1f
    cmpb $0, disk.STATUS + 2
    jne disk.fault
1:  popl %eax
    testl %ebp, %ebp
    jz 2f
    movl $disk.READ, %edi
    call disk.pattern
    movl $(disk.BASE + (disk.no_data - hmpsh_disk_kernel)), %esi
1:  cmpl %eax, (%edi)
    jne disk.fault
    movl $0, (%edi)
    addl $4, %edi
    incl %eax
    decl %ecx
    jnz 1b
    movl %ebp, %eax
    movl $(disk.BASE + (disk.beacon - hmpsh_disk_kernel)), %esi
    call disk.number
2:  incl %ebp
    jmp disk.round

    # eax: a round, then the first word it writes; ecx: words.
disk.pattern:
    imull $0x9e3779b1, %eax, %eax
    movl $disk.WORDS, %ecx
    ret

    # eax: a round, then its first sector.
disk.sector:
    andl $(disk.PLACES - 1), %eax
    addl %eax, %eax
    ret

disk.interrupt:
    pushl %eax
    movl 0xfeb00e60, %eax
    movl %eax, 0xfeb00e64
    movl $0, 0xfee000b0
    popl %eax
    # Interrupts come only while it waits. Not every KVM can do an IRET in this mode.
disk.spurious:
    addl $12, %esp
    jmp disk.wait

disk.trap:
    movl $(disk.BASE + (disk.trapped - hmpsh_disk_kernel)), %esi
disk.fault:
    call disk.string
1:  cli
    hlt
    jmp 1b

    # The string at esi, the number eax in decimal, an end of line.
disk.number:
    pushl %eax
    call disk.string
    popl %eax
    xorl %esi, %esi
    movl $10, %ecx
1:  xorl %edx, %edx
    divl %ecx
    pushl %edx
    incl %esi
    testl %eax, %eax
    jnz 1b
2:  popl %eax
    addb $0x30, %al
    call disk.byte
    decl %esi
    jnz 2b
    movb $0x0a, %al
    jmp disk.byte

disk.string:
    movb (%esi), %al
    testb %al, %al
    jz 1f
    incl %esi
    call disk.byte
    jmp disk.string
1:  ret

disk.byte:
    movb %al, %cl
    movl $0x3fd, %edx
1:  inb %dx, %al
    testb $0x20, %al
    jz 1b
    movb %cl, %al
    movl $0x3f8, %edx
    outb %al, %dx
    ret

    .balign 16
disk.descriptors:
    .quad disk.HEADERS
    .long 16
    .short 1, 1
    .quad disk.WRITTEN
    .long disk.WORDS * 4
    .short 1, 2
    .quad disk.STATUS
    .long 1
    .short 2, 0
    .quad disk.TABLE
    .long 48
    .short 4, 0
    .quad disk.HEADERS + 32
    .long 16
    .short 1, 5
    .quad disk.STATUS + 2
    .long 1
    .short 2, 0
    # The table.
    .quad disk.HEADERS + 16
    .long 16
    .short 1, 1
    .quad disk.READ
    .long disk.WORDS * 4
    .short 3, 2
    .quad disk.STATUS + 1
    .long 1
    .short 2, 0

disk.hello:     .asciz "hmpsh guest disk features "
disk.hello_modern: .asciz "hmpsh guest modern disk features "
disk.beacon:    .asciz "B "
disk.no_disk:   .asciz "FAULT no disk\n"
disk.no_queue:  .asciz "FAULT no queue\n"
disk.no_status: .asciz "FAULT status\n"
disk.no_data:   .asciz "FAULT data\n"
disk.trapped:   .asciz "FAULT trap\n"

    .balign 8
disk.idt:
    .rept 47
    .short disk.trap - hmpsh_disk_kernel, 8, 0x8e00, disk.BASE >> 16
    .endr
    .short disk.spurious - hmpsh_disk_kernel, 8, 0x8e00, disk.BASE >> 16
    .short disk.interrupt - hmpsh_disk_kernel, 8, 0x8e00, disk.BASE >> 16
disk.idt_pointer:
    .short 8 * 49 - 1
    .long disk.BASE + (disk.idt - hmpsh_disk_kernel)
disk.gdt_pointer:
    .short 3 * 8 - 1
    .long disk.BASE + (disk.gdt - hmpsh_disk_kernel)
    .org hmpsh_disk_kernel - hmpsh_disk_kernel + 0x1000
    .code64
    .popsection
