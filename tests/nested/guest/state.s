# A firmware image that keeps something in every part of the processor's state that it finds there
# and looks at it again and again: `B N` as long as all is as it was, else `FAULT WHAT`.

    .include "entry.s"

    .set PAUSES, 20000
    .set COUNT, 0x7000                  # in RAM: the last beacon
    .set MXCSR, 0x1fa0
    .set PKRU, 0x55555550
    .set XCR0, 0x207                    # x87, SSE, AVX, PKRU

    # MSRs and what is kept in them.
    .balign 8
msrs:
    .long 0x174, 0x0010, 0              # SYSENTER_CS
    .long 0x175, 0x12345678, 0          # SYSENTER_ESP
    .long 0x176, 0x23456789, 0          # SYSENTER_EIP
    .long 0x277, 0x00070106, 0x00070406 # PAT
    .long 0xc0000081, 0x11223344, 0x00180008 # STAR
    .long 0xc0000082, 0x33445566, 0x7fff # LSTAR
    .long 0xc0000083, 0x44556677, 0x7ffe # CSTAR
    .long 0xc0000084, 0x00047700, 0     # SFMASK
    .long 0xc0000100, 0x00000000, 0x1   # FS base
    .long 0xc0000102, 0x66778899, 0x7ffd # kernel GS base
    .long 0xc0000103, 0x00000abc, 0     # TSC_AUX
msrs_end:

    .balign 32
vectors:
    .irp n, 0,1,2,3,4,5,6,7
    .rept 8
    .long 0xabcd0000 + \n * 0x101 + (. - vectors) * 0x1000
    .endr
    .endr
mxcsr:
    .long MXCSR

main:
    movl %cr4, %eax
    orl $0x440600, %eax                 # FXSR, SIMD exceptions, XSAVE, protection keys
    movl %eax, %cr4
    movl %cr0, %eax
    andl $0xfffffff3, %eax              # no emulation, no task switched
    orl $2, %eax
    movl %eax, %cr0
    fninit
    fldpi
    xorl %ecx, %ecx
    xorl %edx, %edx
    movl $XCR0, %eax
    xsetbv
    ldmxcsr mxcsr
    movl $PKRU, %eax
    wrpkru
    .irp n, 0,1,2,3,4,5,6,7
    vmovdqa vectors + 32 * \n, %ymm\n
    .endr
    movl $0x00123450, %eax
    movl %eax, %dr0
    movl $msrs, %esi
1:  movl (%esi), %ecx
    movl 4(%esi), %eax
    movl 8(%esi), %edx
    wrmsr
    addl $12, %esi
    cmpl $msrs_end, %esi
    jb 1b
    movl $0, COUNT

again:
    movl $PAUSES, %ecx
1:  pause
    loop 1b

    movl $is_xcr0, %esi
    xorl %ecx, %ecx
    xgetbv
    cmpl $XCR0, %eax
    jne fault
    movl $is_mxcsr, %esi
    stmxcsr COUNT + 8
    movl COUNT + 8, %eax
    cmpl $MXCSR, %eax
    jne fault
    movl $is_pkru, %esi
    rdpkru
    cmpl $PKRU, %eax
    jne fault
    movl $is_dr0, %esi
    movl %dr0, %eax
    cmpl $0x00123450, %eax
    jne fault

    # pi is still there, and nothing else.
    movl $is_x87, %esi
    fldpi
    fcomp %st(1)
    fnstsw %ax
    andl $0x7f00, %eax                  # the stack's top is 7, the two are equal
    cmpl $0x7800, %eax
    jne fault

    .irp n, 0,1,2,3,4,5,6,7
    movl $\n, %ebx
    vmovdqu %ymm\n, COUNT + 0x20
    call vector
    .endr

    movl $msrs, %edi
1:  movl (%edi), %ecx
    rdmsr
    cmpl 4(%edi), %eax
    jne fault_msr
    cmpl 8(%edi), %edx
    jne fault_msr
    addl $12, %edi
    cmpl $msrs_end, %edi
    jb 1b

    incl COUNT
    movb $0x42, %al
    call byte
    movb $0x20, %al
    call byte
    movl COUNT, %eax
    call word
    movb $0x0a, %al
    call byte
    jmp again

    # Compares vector register ebx, which was stored.
vector:
    movl %ebx, %esi
    shll $5, %esi
    addl $vectors, %esi
    movl $(COUNT + 0x20), %edi
    movl $8, %ecx
    repe cmpsl
    je 1f
    movl -4(%edi), %eax
    movl $is_vector, %esi
    jmp fault
1:  ret

fault_msr:
    movl $is_msr, %esi
    movl %ecx, %ebx
    # What is at esi, its number ebx, what was found in eax.
fault:
    pushl %eax
    pushl %esi
    movl $has_fault, %esi
    call string
    popl %esi
    call string
    movl %ebx, %eax
    call word
    movb $0x20, %al
    call byte
    popl %eax
    call word
    movb $0x0a, %al
    call byte
1:  cli
    hlt
    jmp 1b

has_fault: .asciz "FAULT "
is_xcr0:   .asciz "XCR0 "
is_mxcsr:  .asciz "MXCSR "
is_pkru:   .asciz "PKRU "
is_dr0:    .asciz "DR0 "
is_x87:    .asciz "x87 "
is_vector: .asciz "vector "
is_msr:    .asciz "MSR "
