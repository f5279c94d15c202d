# The end of the built-in guest: where a vCPU wakes up.

    .code16
    .org hmpsh_guest_image - hmpsh_guest_image + 0xfff0
    ljmpw $(LOW >> 4), $(guest.start16 - hmpsh_guest_image)
    .org hmpsh_guest_image - hmpsh_guest_image + 0x10000
    .code64
    .popsection
