# The built-in guest's disk: a legacy virtio-blk that the boot vCPU works at from interrupts while
# it rests. Every request has its own descriptors and header, and all are as long.
#
# disk=1: with each tick every idle request reads; the answer is checked against what was written
# there in the last pass, and rewritten. Each sector holds a record at its start and at its end: a
# word of pass and sector number, and a hash of the word and of the record before, in the order of
# the request's sectors. disk=read, disk=write: an answered request is given the next sectors at
# once; what it moves does not matter, so all have the same buffer.
#
# Guest RAM below 1 MiB:
#
#   0x58000  descriptors, 4 per request; available ring     0x59000  used ring
#   0x5a000  what is known of the disk (DISK_*)
#   0x5b000  what is known of a request, 128 bytes each (REQUEST_*); a header is at its start
#   0x60000  buffers, 512 KiB

    .set DISK_CHECK, 1
    .set DISK_WRITE, 3

    .set ENTRIES, 64
    .set RING, 0x58000
    .set AVAILABLE, RING + 16 * ENTRIES
    .set USED, 0x59000
    .set DISK_DEVICE, 0x5a000  # address of the slot
    .set DISK_STRIDE, 0x5a008  # sectors of all requests under way
    .set DISK_END, 0x5a010     # sectors of a pass
    .set DISK_ANSWERED, 0x5a018
    .set DISK_SEEN, 0x5a020    # index in the used ring
    .set DISK_NOW, 0x5a022     # where that ring ended at the last interrupt
    .set DISK_TOLD, 0x5a024    # index in the available ring that the device was kicked for
    .set REQUESTS, 0x5b000
    .set BUFFERS, 0x60000

    .set REQUEST_TYPE, 0       # IN or OUT
    .set REQUEST_SECTOR, 8
    .set REQUEST_STATUS, 16
    .set REQUEST_BUSY, 17
    .set REQUEST_HEAD, 18      # its first descriptor
    .set REQUEST_BUFFER, 24
    .set REQUEST_PASS, 32      # from 1 on (from bit 24 on)
    .set REQUEST_WRITTEN, 40   # hash of the record written last
    .set REQUEST_CHECKED, 48   # of the one checked last
    .set REQUEST_FIRST, 56     # of the one before this pass's first

    .set SECTOR, 512
    # Most requests of a pass of disk=1, in turn: what is wrong is found within half a second.
    .set ROUNDS, 32

    .set SLOTS, 0xfeb00000
    .set SLOT, 0x200
    .set LINE, 5               # of slot 0
    .set VIRTIO_VERSION, 0x04
    .set VIRTIO_DEVICE, 0x08
    .set VIRTIO_OFFERED, 0x10
    .set VIRTIO_OFFERED_SEL, 0x14
    .set VIRTIO_TAKEN, 0x20
    .set VIRTIO_TAKEN_SEL, 0x24
    .set VIRTIO_PAGE, 0x28
    .set VIRTIO_QUEUE, 0x30
    .set VIRTIO_MOST, 0x34
    .set VIRTIO_ENTRIES, 0x38
    .set VIRTIO_ALIGN, 0x3c
    .set VIRTIO_RING, 0x40
    .set VIRTIO_KICK, 0x50
    .set VIRTIO_WHY, 0x60
    .set VIRTIO_ACK, 0x64
    .set VIRTIO_STATUS, 0x70
    .set VIRTIO_CAPACITY, 0x100
    .set FLUSH, 1 << 9
    .set IN, 0
    .set OUT, 1

    # Finds the disk and makes the requests; the first tick starts them.
guest.disk_open:
    cmpq $0, guest.disk(%rip)
    je 9f
    movl $RING, %edi
    xorl %eax, %eax
    movl $((BUFFERS - RING) / 8), %ecx
    rep stosq
    leaq guest.no_disk(%rip), %rsi
    movl $(SLOTS + 7 * SLOT), %edi
1:  cmpl $0x74726976, (%rdi)
    jne 2f
    cmpl $1, VIRTIO_VERSION(%rdi)
    jne 2f
    cmpl $2, VIRTIO_DEVICE(%rdi)
    je 3f
2:  subl $SLOT, %edi
    cmpl $SLOTS, %edi
    jae 1b
    jmp guest.disk_refused
3:  movq %rdi, DISK_DEVICE
    movl $0, VIRTIO_STATUS(%rdi)
    movl $3, VIRTIO_STATUS(%rdi)        # there is a driver
    movl $4096, VIRTIO_PAGE(%rdi)
    # Without this feature the host would flush after each write.
    movl $0, VIRTIO_OFFERED_SEL(%rdi)
    movl VIRTIO_OFFERED(%rdi), %eax
    andl $FLUSH, %eax
    movl $0, VIRTIO_TAKEN_SEL(%rdi)
    movl %eax, VIRTIO_TAKEN(%rdi)
    leaq guest.no_queue(%rip), %rsi
    movl $0, VIRTIO_QUEUE(%rdi)
    cmpl $ENTRIES, VIRTIO_MOST(%rdi)
    jb guest.disk_refused
    movl $ENTRIES, VIRTIO_ENTRIES(%rdi)
    movl $4096, VIRTIO_ALIGN(%rdi)
    movl $(RING >> 12), VIRTIO_RING(%rdi)
    movl $7, VIRTIO_STATUS(%rdi)        # it works
    movl $0xfec00000, %ecx              # the I/O APIC: an edge of its line, to the boot vCPU
    movl %edi, %eax
    shrl $9, %eax
    andl $7, %eax
    leal 0x11 + 2 * LINE(,%rax,2), %eax
    movl %eax, (%rcx)
    movl $0, 0x10(%rcx)
    decl %eax
    movl %eax, (%rcx)
    movl $DISK_VECTOR, 0x10(%rcx)

    movq guest.request(%rip), %rcx
    shrq $9, %rcx
    imulq guest.depth(%rip), %rcx
    movq %rcx, DISK_STRIDE
    movl VIRTIO_CAPACITY + 4(%rdi), %edx
    shlq $32, %rdx
    movl VIRTIO_CAPACITY(%rdi), %eax
    orq %rdx, %rax
    xorl %edx, %edx
    divq %rcx
    leaq guest.small_disk(%rip), %rsi
    testq %rax, %rax
    jz guest.disk_refused
    cmpq $DISK_CHECK, guest.disk(%rip)
    jne 4f
    movl $ROUNDS, %edx
    cmpq %rdx, %rax
    cmovaq %rdx, %rax
4:  imulq %rcx, %rax
    movq %rax, DISK_END

    # Request eax of depth, at ebx: header, data, status, and a descriptor that is not used.
    xorl %eax, %eax
    movl $REQUESTS, %ebx
    movl $RING, %edi
    movl $BUFFERS, %esi
5:  leal (,%rax,4), %ecx
    movw %cx, REQUEST_HEAD(%rbx)
    movq guest.request(%rip), %rdx
    movq %rbx, (%rdi)
    movl $16, 8(%rdi)
    movw $1, 12(%rdi)
    incl %ecx
    movw %cx, 14(%rdi)
    movq %rsi, REQUEST_BUFFER(%rbx)
    movq %rsi, 16(%rdi)
    movl %edx, 24(%rdi)
    incl %ecx
    movw %cx, 30(%rdi)
    leaq REQUEST_STATUS(%rbx), %rcx
    movq %rcx, 32(%rdi)
    movl $1, 40(%rdi)
    movw $2, 44(%rdi)
    movq $NEXT, REQUEST_PASS(%rbx)
    cmpq $DISK_CHECK, guest.disk(%rip)
    jne 6f
    addq %rdx, %rsi
6:  shrq $9, %rdx
    imulq %rax, %rdx
    movq %rdx, REQUEST_SECTOR(%rbx)
    xorl %ecx, %ecx
    cmpq $DISK_WRITE, guest.disk(%rip)
    sete %cl
    call guest.disk_turn
    addl $128, %ebx
    addl $64, %edi
    incl %eax
    cmpq guest.depth(%rip), %rax
    jb 5b
    xorl %ebx, %ebx
9:  ret

guest.disk_refused:
    movb $1, FAULTED
    call guest.text
    jmp guest.stop

    # Request rbx is to do ecx, IN or OUT.
guest.disk_turn:
    movl %ecx, REQUEST_TYPE(%rbx)
    movzwl REQUEST_HEAD(%rbx), %edx
    shll $4, %edx
    negl %ecx
    leal 3(,%rcx,2), %ecx               # another one follows, and unless OUT the device writes
    movw %cx, RING + 16 + 12(%rdx)
    ret

    # Makes request rbx available to the device. Keeps all but rax and rcx.
guest.disk_submit:
    movb $0xff, REQUEST_STATUS(%rbx)
    movb $1, REQUEST_BUSY(%rbx)
    movzwl AVAILABLE + 2, %eax
    andl $(ENTRIES - 1), %eax
    movzwl REQUEST_HEAD(%rbx), %ecx
    movw %cx, AVAILABLE + 4(,%rax,2)
    incw AVAILABLE + 2
    ret

    # Tells the device of what is new in the ring, if it wants to know.
guest.disk_kick:
    movzwl AVAILABLE + 2, %eax
    cmpw %ax, DISK_TOLD
    je 1f
    movw %ax, DISK_TOLD
    lock orl $0, (%rsp)                 # the index before the flag
    testb $1, USED
    jnz 1f
    movq DISK_DEVICE, %rax
    movl $0, VIRTIO_KICK(%rax)
1:  ret

    # Starts what is idle. Keeps all but rax and rcx.
guest.disk_tick:
    cmpq $0, guest.disk(%rip)
    je 3f
    pushq %rbx
    pushq %rdx
    movl $REQUESTS, %ebx
    movq guest.depth(%rip), %rdx
1:  cmpb $0, REQUEST_BUSY(%rbx)
    jne 2f
    call guest.disk_submit
2:  addl $128, %ebx
    decl %edx
    jnz 1b
    call guest.disk_kick
    popq %rdx
    popq %rbx
3:  ret

    # Something was answered. It is dealt with here, and the guest rests on; see guest.timer.
guest.disk_interrupt:
    movw $(guest.halt - hmpsh_guest_image), (%rsp)
    movl $0, APIC_EOI(%r15)
    pushq %rbx
    pushq %rdi
    pushq %r8
    pushq %r13
    movq DISK_DEVICE, %rdi
    movl VIRTIO_WHY(%rdi), %eax
    movl %eax, VIRTIO_ACK(%rdi)
    # What is answered from here on interrupts again: a fast device must not keep the timer out.
    movzwl USED + 2, %eax
    movw %ax, DISK_NOW
guest.disk_answer:
    movzwl DISK_SEEN, %eax
    cmpw %ax, DISK_NOW
    je 3f
    incw DISK_SEEN
    andl $(ENTRIES - 1), %eax
    movl USED + 4(,%rax,8), %eax
    movl %eax, %ebx
    shll $5, %ebx
    testb $3, %al
    jnz guest.disk_stray
    shrl $2, %eax
    cmpq guest.depth(%rip), %rax
    jae guest.disk_stray
    cmpb $0, REQUESTS + REQUEST_BUSY(%rbx)
    je guest.disk_stray
    addl $REQUESTS, %ebx
    movb $0, REQUEST_BUSY(%rbx)
    cmpb $0, REQUEST_STATUS(%rbx)
    jne guest.disk_failed
    incq DISK_ANSWERED
    cmpq $DISK_CHECK, guest.disk(%rip)
    jne 2f
    movl $OUT, %ecx
    cmpl $IN, REQUEST_TYPE(%rbx)
    jne 1f
    call guest.disk_turn
    call guest.disk_check
    call guest.disk_submit
    jmp guest.disk_answer
1:  movl $IN, %ecx
    call guest.disk_turn
    call guest.disk_next                # and wait for the tick
    jmp guest.disk_answer
2:  call guest.disk_next
    call guest.disk_submit
    jmp guest.disk_answer
3:  call guest.disk_kick
    popq %r13
    popq %r8
    popq %rdi
    popq %rbx
    iretq

    # Request rbx goes on to its next sectors.
guest.disk_next:
    movq REQUEST_SECTOR(%rbx), %rax
    addq DISK_STRIDE, %rax
    cmpq DISK_END, %rax
    jb 1f
    subq DISK_END, %rax
    addq $NEXT, REQUEST_PASS(%rbx)
    movq REQUEST_FIRST(%rbx), %rcx
    movq %rcx, REQUEST_CHECKED(%rbx)
    movq REQUEST_WRITTEN(%rbx), %rcx
    movq %rcx, REQUEST_FIRST(%rbx)
1:  movq %rax, REQUEST_SECTOR(%rbx)
    ret

    # Checks what request rbx has read, unless it is its first pass, and writes this pass's records
    # into the buffer: rdi sector, r13 its number, r8 the buffer's end.
guest.disk_check:
    movq REQUEST_BUFFER(%rbx), %rdi
    movq REQUEST_SECTOR(%rbx), %r13
    movq guest.request(%rip), %r8
    addq %rdi, %r8
1:  movq REQUEST_PASS(%rbx), %rax
    subq $NEXT, %rax
    jz 2f
    movq REQUEST_CHECKED(%rbx), %rcx
    call guest.disk_record
    movq %rcx, REQUEST_CHECKED(%rbx)
    xorl %edx, %edx
    cmpq %rax, (%rdi)
    jne guest.disk_fault
    cmpq %rcx, 8(%rdi)
    jne guest.disk_fault
    movl $(SECTOR - RECORD), %edx
    cmpq %rax, SECTOR - RECORD(%rdi)
    jne guest.disk_fault
    cmpq %rcx, SECTOR - RECORD + 8(%rdi)
    jne guest.disk_fault
2:  movq REQUEST_PASS(%rbx), %rax
    movq REQUEST_WRITTEN(%rbx), %rcx
    call guest.disk_record
    movq %rcx, REQUEST_WRITTEN(%rbx)
    movq %rax, (%rdi)
    movq %rcx, 8(%rdi)
    movq %rax, SECTOR - RECORD(%rdi)
    movq %rcx, SECTOR - RECORD + 8(%rdi)
    incq %r13
    addq $SECTOR, %rdi
    cmpq %r8, %rdi
    jb 1b
    ret

    # The record of sector r13 in pass rax, after one with the hash rcx: rax and rcx.
guest.disk_record:
    orq %r13, %rax
    xorq %rax, %rcx
    imulq %r9, %rcx
    movq %rcx, %rdx
    shrq $32, %rdx
    xorq %rdx, %rcx
    ret

guest.disk_fault:
    leaq guest.fault_sector(%rip), %r8
    jmp guest.fault_record

    # Request rbx was not answered with 0.
guest.disk_failed:
    movb $1, FAULTED
    call guest.lock
    leaq guest.fault_status(%rip), %rsi
    call guest.string
    movzbl REQUEST_STATUS(%rbx), %eax
    call guest.decimal
    leaq guest.fault_at_sector(%rip), %rsi
    call guest.string
    movq REQUEST_SECTOR(%rbx), %rax
    call guest.decimal
    call guest.end_line
    jmp guest.stop

    # An answer to a request that is not under way: ebx is 32 times its first descriptor.
guest.disk_stray:
    movb $1, FAULTED
    call guest.lock
    leaq guest.fault_stray(%rip), %rsi
    call guest.string
    movl %ebx, %eax
    shrl $5, %eax
    call guest.decimal
    call guest.end_line
    jmp guest.stop

    # D <requests> <sectors>, after a beacon. Keeps what guest.say_beacon keeps.
guest.say_disk:
    cmpq $0, guest.disk(%rip)
    je 1f
    call guest.lock
    movb $0x44, %al
    call guest.byte
    movb $0x20, %al
    call guest.byte
    movq DISK_ANSWERED, %rax
    call guest.decimal
    movb $0x20, %al
    call guest.byte
    movq guest.request(%rip), %rax
    shrq $9, %rax
    imulq DISK_ANSWERED, %rax
    call guest.decimal
    call guest.end_line
1:  ret

guest.no_disk:          .asciz "FAULT disk not found"
guest.no_queue:         .asciz "FAULT disk has no queue"
guest.small_disk:       .asciz "FAULT disk too small"
guest.fault_sector:     .asciz "FAULT sector "
guest.fault_status:     .asciz "FAULT disk status "
guest.fault_at_sector:  .asciz " sector "
guest.fault_stray:      .asciz "FAULT disk answers "
