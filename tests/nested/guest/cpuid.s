# A firmware image of 64 KiB that tells on COM1 every CPUID leaf its processor has, then `end`.
# A line is function, index, EAX, EBX, ECX, EDX. An index above 0 is shown if it is not all zero.

    .include "entry.s"

    .set LAST_INDEX, 63

    # Functions that have an index, and how many indexes are looked at. 0xb and 0x1f answer for any.
indexed:
    .long 0x4, LAST_INDEX, 0x7, LAST_INDEX, 0xb, 3, 0xd, LAST_INDEX, 0xf, LAST_INDEX
    .long 0x10, LAST_INDEX, 0x12, LAST_INDEX, 0x14, LAST_INDEX, 0x17, LAST_INDEX
    .long 0x18, LAST_INDEX, 0x1a, LAST_INDEX, 0x1d, LAST_INDEX, 0x1e, LAST_INDEX, 0x1f, 3
    .long 0x20, LAST_INDEX, 0x24, LAST_INDEX
    .long 0x8000001d, LAST_INDEX, 0x80000020, LAST_INDEX, 0x80000026, LAST_INDEX
indexed_end:

main:
    xorl %esi, %esi
    call range
    movl $0x40000000, %esi
    call range
    # What QEMU can put behind KVM's leaves.
    movl $0x40000010, %esi
    call function
    movl $0x80000000, %esi
    call range
    movl $0xc0000000, %esi
    call function
    movl $end, %esi
    call string
1:  cli
    hlt
    jmp 1b

    # All functions from esi to the last one that it names, and one more: what is out of range has
    # an answer too.
range:
    movl %esi, %eax
    xorl %ecx, %ecx
    cpuid
    cmpl %esi, %eax
    jae 1f
    movl %esi, %eax
1:  incl %eax
    pushl %eax
2:  call function
    incl %esi
    cmpl (%esp), %esi
    jbe 2b
    popl %eax
    ret

    # Function esi with all its indexes.
function:
    xorl %ebp, %ebp                     # the last index
    movl $indexed, %edi
1:  cmpl %esi, (%edi)
    jne 2f
    movl 4(%edi), %ebp
2:  addl $8, %edi
    cmpl $indexed_end, %edi
    jb 1b
    xorl %edi, %edi
3:  movl %esi, %eax
    movl %edi, %ecx
    cpuid
    testl %edi, %edi
    jz 4f
    pushl %eax
    orl %ebx, %eax
    orl %ecx, %eax
    orl %edx, %eax
    popl %eax
    jz 5f
4:  pushl %edx
    pushl %ecx
    pushl %ebx
    pushl %eax
    pushl %edi
    pushl %esi
    movl $6, %ecx
6:  popl %eax
    call word
    movb $0x20, %al
    call byte
    loop 6b
    movb $0x0a, %al
    call byte
5:  incl %edi
    cmpl %ebp, %edi
    jbe 3b
    ret

end:
    .asciz "end\n"
