# A kernel that says what it was started with, for tests: 32-bit code loaded at 1 MiB, by multiboot
# (EAX is the magic, EBX the info) or by Linux's boot protocol (ESI is the zero page).

    .set BASE, 0x100000
    .set STACK, 0x80000
    .set POINTER, 0x9fc00
    .set MAGIC, 0x1badb002
    .set HAS_ADDRESSES, 0x10000

    .pushsection .rodata.hmpsh_report, "a", @progbits
    .balign 4096
    .globl hmpsh_report_kernel
    .hidden hmpsh_report_kernel
hmpsh_report_kernel:
    .code32
    jmp report.start
    .org hmpsh_report_kernel - hmpsh_report_kernel + 8
    # The multiboot header: it is itself at BASE + 8, the file at BASE, all of it, no more.
    .long MAGIC, HAS_ADDRESSES, -(MAGIC + HAS_ADDRESSES)
    .long BASE + 8, BASE, 0, 0, BASE

report.start:
    cld
    movl $STACK, %esp
    cmpl $0x2badb002, %eax
    jne report.linux

    movl $(BASE + (report.memory - hmpsh_report_kernel)), %esi
    call report.string
    movl 4(%ebx), %eax
    call report.hex
    movl 8(%ebx), %eax
    call report.hex
    call report.end_line
    movl 48(%ebx), %edi
    movl 44(%ebx), %ebp
    addl %edi, %ebp
1:  cmpl %ebp, %edi
    jae 2f
    pushl %edi
    addl $4, %edi
    call report.row
    popl %edi
    addl (%edi), %edi
    addl $4, %edi
    jmp 1b
2:  movl 16(%ebx), %esi
    call report.line
    movl $(BASE + (report.loader - hmpsh_report_kernel)), %esi
    call report.string
    movl 64(%ebx), %esi
    call report.string
    call report.end_line
    movl 20(%ebx), %ebp
    movl 24(%ebx), %edi
3:  subl $1, %ebp
    jb report.mp
    movl $(BASE + (report.module - hmpsh_report_kernel)), %esi
    call report.string
    movl (%edi), %eax
    call report.hex
    movl 8(%edi), %esi
    call report.string
    movl $(BASE + (report.holds - hmpsh_report_kernel)), %esi
    call report.string
    movl (%edi), %esi
    movl 4(%edi), %ecx
    subl %esi, %ecx
    call report.bytes
    call report.end_line
    addl $16, %edi
    jmp 3b

report.linux:
    movl %esi, %ebx
    # The descriptors must be there: segments are loaded from them.
    movw $0x18, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    ljmpl $0x10, $(BASE + (1f - hmpsh_report_kernel))
1:  movzbl 0x1e8(%ebx), %ebp
    leal 0x2d0(%ebx), %edi
2:  subl $1, %ebp
    jb 3f
    call report.row
    addl $20, %edi
    jmp 2b
3:  movl 0x228(%ebx), %esi
    call report.line
    movl $(BASE + (report.module - hmpsh_report_kernel)), %esi
    call report.string
    movl 0x218(%ebx), %eax
    call report.hex
    movl $(BASE + (report.holds - hmpsh_report_kernel)), %esi
    call report.string
    movl 0x218(%ebx), %esi
    movl 0x21c(%ebx), %ecx
    call report.bytes
    call report.end_line

report.mp:
    movl $(BASE + (report.table - hmpsh_report_kernel)), %esi
    call report.string
    movl $POINTER, %esi
    movzwl POINTER + 16 + 4, %ebp
    addl $16, %ebp
1:  lodsb
    call report.hex_byte
    decl %ebp
    jnz 1b
    call report.end_line
    movl $(BASE + (report.processor - hmpsh_report_kernel)), %esi
    call report.string
    movl $1, %eax
    cpuid
    pushl %edx
    call report.hex
    popl %eax
    call report.hex
    movl $(BASE + (report.end - hmpsh_report_kernel)), %esi
    call report.string
1:  cli
    hlt
    jmp 1b

    # The row of a memory table at edi, unless it is empty.
report.row:
    movl 8(%edi), %eax
    orl 12(%edi), %eax
    jz 1f
    movl $(BASE + (report.range - hmpsh_report_kernel)), %esi
    call report.string
    movl 4(%edi), %eax
    call report.hex
    movl (%edi), %eax
    call report.hex
    movl 12(%edi), %eax
    call report.hex
    movl 8(%edi), %eax
    call report.hex
    movl 16(%edi), %eax
    call report.hex
    call report.end_line
1:  ret

    # The command line at esi.
report.line:
    pushl %esi
    movl $(BASE + (report.command_line - hmpsh_report_kernel)), %esi
    call report.string
    popl %esi
    call report.string
    jmp report.end_line

    # eax as eight digits and a space.
report.hex:
    movl $4, %ecx
1:  roll $8, %eax
    pushl %eax
    pushl %ecx
    call report.hex_byte
    popl %ecx
    popl %eax
    decl %ecx
    jnz 1b
    movb $0x20, %al
    jmp report.byte

report.hex_byte:
    pushl %eax
    shrb $4, %al
    call report.digit
    popl %eax
    andb $15, %al
report.digit:
    addb $0x30, %al
    cmpb $0x39, %al
    jbe report.byte
    addb $0x27, %al
    jmp report.byte

    # ecx characters at esi.
report.bytes:
    jecxz 2f
1:  lodsb
    pushl %ecx
    call report.byte
    popl %ecx
    decl %ecx
    jnz 1b
2:  ret

report.string:
    lodsb
    testb %al, %al
    jz 1f
    call report.byte
    jmp report.string
1:  ret

report.end_line:
    movb $0x0a, %al
report.byte:
    movb %al, %cl
    movl $0x3fd, %edx
1:  inb %dx, %al
    testb $0x20, %al
    jz 1b
    movb %cl, %al
    movl $0x3f8, %edx
    outb %al, %dx
    ret

report.memory:       .asciz "memory "
report.range:        .asciz "e820 "
report.command_line: .asciz "line "
report.loader:       .asciz "loader "
report.module:       .asciz "module "
report.holds:        .asciz " holds "
report.table:        .asciz "mp "
report.processor:    .asciz "cpuid "
report.end:          .asciz "\nend\n"
    .org hmpsh_report_kernel - hmpsh_report_kernel + 0x400
    .code64
    .popsection
