# How a flat firmware image of 64 KiB comes to 32-bit code: at `main`, running from its copy below
# 1 MiB, with a stack in RAM. For .include; the linker puts .reset where a vCPU wakes up.

    .set COM1, 0x3f8

    .section .reset, "ax", @progbits
    .code16
    ljmpw $0xf000, $start16 - gdt
    .org 16

    .text
    .globl _start
_start:
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff
    .quad 0x00cf93000000ffff
gdt_pointer:
    .short 3 * 8 - 1
    .long gdt

start16:
    cli
    cld
    movw $0xf000, %ax
    movw %ax, %ds
    lgdtl gdt_pointer - gdt
    movl %cr0, %eax
    orl $1, %eax
    movl %eax, %cr0
    ljmpl $0x8, $start32

    .code32
start32:
    movw $0x10, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movl $0x8000, %esp
    jmp main

    # The string at esi.
string:
    lodsb
    testb %al, %al
    jz 1f
    call byte
    jmp string
1:  ret

    # eax in hexadecimal; keeps ecx.
word:
    pushl %ecx
    movl $8, %ecx
1:  roll $4, %eax
    pushl %eax
    andb $0xf, %al
    addb $0x30, %al
    cmpb $0x39, %al
    jbe 2f
    addb $0x27, %al
2:  call byte
    popl %eax
    loop 1b
    popl %ecx
    ret

    # al; keeps everything else.
byte:
    pushl %edx
    pushl %eax
    movl $(COM1 + 5), %edx
1:  inb %dx, %al
    testb $0x20, %al
    jz 1b
    popl %eax
    movl $COM1, %edx
    outb %al, %dx
    popl %edx
    ret
