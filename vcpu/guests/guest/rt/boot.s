# Multiboot entry and the way into long mode. AT&T syntax, as kernels have it.

.set MULTIBOOT_MAGIC, 0x1badb002
.set MULTIBOOT_FLAGS, 0x00010002        # addresses below are valid; memory size wanted

.section .boot32, "ax", @progbits
.code32
.balign 4
multiboot_header:
    .long MULTIBOOT_MAGIC
    .long MULTIBOOT_FLAGS
    .long -(MULTIBOOT_MAGIC + MULTIBOOT_FLAGS)
    .long multiboot_header
    .long image_start
    .long image_load_end
    .long image_end
    .long boot

# First processor: 32-bit protected mode, paging off, EAX = magic, EBX = information.
.global boot
boot:
    cli
    cld
    movl %eax, %esi
    movl %ebx, %edi
    # Identity map of 4 GiB with 2 MiB pages.
    movl $page_directories, %ebx
    movl $0x83, %eax                    # present, writable, large page
    movl $2048, %ecx
1:  movl %eax, (%ebx)
    movl $0, 4(%ebx)
    addl $0x200000, %eax
    addl $8, %ebx
    decl %ecx
    jnz 1b
    movl $page_directories + 0x0003, page_directory_pointers
    movl $page_directories + 0x1003, page_directory_pointers + 8
    movl $page_directories + 0x2003, page_directory_pointers + 16
    movl $page_directories + 0x3003, page_directory_pointers + 24
    movl $page_directory_pointers + 3, page_map_level_4
    xorl %ebp, %ebp
    jmp enter_long_mode

# Second processor, from ap_start16.
protected_mode_ap:
    movl $1, %ebp

# EBP = processor's number, ESI and EDI = arguments of the first.
enter_long_mode:
    lgdtl gdt_pointer
    movl %cr4, %eax
    orl $0x20, %eax                     # PAE
    movl %eax, %cr4
    movl $page_map_level_4, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx              # IA32_EFER
    rdmsr
    orl $0x100, %eax                    # LME
    wrmsr
    movl %cr0, %eax
    andl $0x9fffffff, %eax              # caches on: INIT leaves CD and NW set
    orl $0x80000000, %eax               # PG
    movl %eax, %cr0
    ljmpl $0x18, $long_mode

.section .boot16, "ax", @progbits
.code16
# Copied to the start page of the second processor: CS:IP = page:0, real mode.
.global ap_start16
ap_start16:
    cli
    movw %cs, %ax
    movw %ax, %ds
    lgdtl (ap_gdt_pointer - ap_start16)
    movl %cr0, %eax
    orl $1, %eax                        # PE
    movl %eax, %cr0
    ljmpl $0x08, $flat_ap
ap_gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
.global ap_end16
ap_end16:

.section .boot32, "ax", @progbits
.code32
flat_ap:
    movw $0x10, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    jmp protected_mode_ap

.section .text.boot, "ax", @progbits
.code64
long_mode:
    movw $0x10, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    xorl %eax, %eax
    movw %ax, %fs
    movw %ax, %gs
    leal 1(%rbp), %eax
    shll $14, %eax                      # 16 KiB of stack for each
    leaq stacks(%rax), %rsp
    movl %edi, %edx                     # information
    movl %ebp, %edi                     # processor's number; ESI: magic
    xorl %ebp, %ebp
    call rt_main
    ud2

# Exceptions: one 16-byte stub for each vector, so that the IDT is computed.
.balign 16
.global exception_stubs
exception_stubs:
.set vector, 0
.rept 32
    .balign 16
    .if !(vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21)
    pushq $0
    .endif
    pushq $vector
    jmp exception_common
    .set vector, vector + 1
.endr
exception_common:
    cld
    movq %rsp, %rdi
    andq $-16, %rsp
    call rt_exception
    ud2

.section .data.boot, "aw", @progbits
.balign 8
.global gdt
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff            # 0x08: 32-bit code
    .quad 0x00cf93000000ffff            # 0x10: data
    .quad 0x00af9b000000ffff            # 0x18: 64-bit code
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt

.section .bss.boot, "aw", @nobits
.balign 4096
page_map_level_4:        .skip 0x1000
page_directory_pointers: .skip 0x1000
page_directories:        .skip 0x4000
stacks:                  .skip 0x8000
