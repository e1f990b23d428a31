# A boot sector that does what an operating system does first: long mode, paging, timer interrupts waking a halted CPU.
# R, L and T go to the serial port as the stages are reached; the end leaves QEMU through isa-debug-exit.
.code16
.globl _start
_start:
  cli
  xor %ax, %ax
  mov %ax, %ds
  mov %ax, %es
  mov %ax, %ss
  mov $0x7c00, %sp
  mov $'R', %al
  call put16
  # page tables: PML4 at 0x1000, PDPT at 0x2000, PD at 0x3000 (2 MiB pages), and PT at 0x4000 (4 KiB) for the first 2 MiB
  mov $0x1000, %edi
  xor %eax, %eax
  mov $0x1000, %ecx
  rep stosl
  movl $0x2003, 0x1000
  movl $0x3003, 0x2000
  movl $0x4003, 0x3000
  movl $0x200083, 0x3008
  mov $0x4000, %edi
  mov $0x003, %eax
1: mov %eax, (%edi)
  add $0x1000, %eax
  add $8, %edi
  cmp $0x5000, %edi
  jb 1b
  lgdt gdtr
  mov %cr4, %eax
  or $0xa0, %eax          # PAE, PGE
  mov %eax, %cr4
  mov $0x1000, %eax
  mov %eax, %cr3
  mov $0xc0000080, %ecx   # EFER
  rdmsr
  or $0x100, %eax         # LME
  wrmsr
  mov %cr0, %eax
  or $0x80000001, %eax    # PG, PE
  mov %eax, %cr0
  ljmp $8, $long
put16:
  mov $0x3f8, %dx
  out %al, %dx
  ret
.code64
long:
  mov $'L', %al
  mov $0x3f8, %dx
  out %al, %dx
  # touch memory through other mappings and flush, so that page tables are walked again
  mov %cr3, %rax
  mov %rax, %cr3
  invlpg 0x5000
  xor %eax, %eax
  cpuid
  # compute and write memory: an emulated supervisor mode is a thousand times slower here
  mov $2000000, %ecx
1: mov %ecx, %eax
  and $0xff8, %eax
  add %rcx, 0x100000(%rax)
  dec %ecx
  jnz 1b
  # IDT at 0x5000: vector 0x20 is the timer
  mov $tick, %eax
  mov %ax, 0x5200
  movw $8, 0x5202
  movw $0x8e00, 0x5204
  shr $16, %eax
  mov %ax, 0x5206
  lidt idtr
  mov $0x11, %al          # PIC: vectors from 0x20, only the timer
  out %al, $0x20
  mov $0x20, %al
  out %al, $0x21
  mov $0x04, %al
  out %al, $0x21
  mov $0x01, %al
  out %al, $0x21
  mov $0xfe, %al
  out %al, $0x21
  mov $0x34, %al          # PIT: about 100 Hz
  out %al, $0x43
  mov $0x9c, %al
  out %al, $0x40
  mov $0x2e, %al
  out %al, $0x40
  xor %ebx, %ebx
  sti
1: hlt
  cmp $5, %ebx
  jb 1b
  mov $'T', %al
  mov $0x3f8, %dx
  out %al, %dx
  mov $0x15, %al
  out %al, $0xf4
2: hlt
  jmp 2b
tick:
  inc %ebx
  push %rax
  mov $0x20, %al
  out %al, $0x20
  pop %rax
  iretq
.align 8
gdt: .quad 0, 0x00209a0000000000
gdtr: .word 15
  .long gdt
idtr: .word 0x20f
  .quad 0x5000
.org 510
.word 0xaa55
