//! The program of a sandbox's init process: an executable of a few instructions, in memory.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

/// The descriptor of a pipe from the runner: the program ends when something can be read there, or the pipe is closed.
pub(super) const PARENT_PIPE: RawFd = 3;

/// Instructions for read(PARENT_PIPE, …, 1) and exit(0).
#[cfg(target_arch = "x86_64")]
const CODE: &[u8] = &[
    0x31, 0xc0, // xor eax, eax
    0xbf, 0x03, 0x00, 0x00, 0x00, // mov edi, 3
    0x48, 0x8d, 0x74, 0x24, 0xf0, // lea rsi, [rsp-16]
    0xba, 0x01, 0x00, 0x00, 0x00, // mov edx, 1
    0x0f, 0x05, // syscall
    0xb8, 0x3c, 0x00, 0x00, 0x00, // mov eax, 60
    0x31, 0xff, // xor edi, edi
    0x0f, 0x05, // syscall
];
#[cfg(target_arch = "aarch64")]
const CODE: &[u8] = &[
    0x60, 0x00, 0x80, 0xd2, // mov x0, #3
    0xe1, 0x43, 0x00, 0xd1, // sub x1, sp, #16
    0x22, 0x00, 0x80, 0xd2, // mov x2, #1
    0xe8, 0x07, 0x80, 0xd2, // mov x8, #63
    0x01, 0x00, 0x00, 0xd4, // svc #0
    0xa8, 0x0b, 0x80, 0xd2, // mov x8, #93
    0x00, 0x00, 0x80, 0xd2, // mov x0, #0
    0x01, 0x00, 0x00, 0xd4, // svc #0
];

/// The architecture, as e_machine of elf(5).
#[cfg(target_arch = "x86_64")]
const MACHINE: u16 = 62;
#[cfg(target_arch = "aarch64")]
const MACHINE: u16 = 183;

const LOAD_ADDRESS: u64 = 0x40_0000;
/// Bytes of the ELF header and of one program header.
const HEADERS: u64 = 64 + 56;

/// The program, ready to be executed.
#[derive(Debug)]
pub(crate) struct InitProgram(OwnedFd);

impl InitProgram {
    pub(crate) fn new() -> io::Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        // Kernels before 6.3 do not know the flag that says it may be executed, nor forbid it.
        let memory = memfd_create(c"bb-init", flags | MemfdFlags::EXEC)
            .or_else(|_| memfd_create(c"bb-init", flags))?;
        rustix::io::write(&memory, &image())?;
        let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
        fcntl_add_seals(&memory, seals)?;
        // Executed through a descriptor that cannot write.
        let path = format!("/proc/self/fd/{}", memory.as_raw_fd());
        Ok(InitProgram(std::fs::File::open(path)?.into()))
    }
}

impl AsFd for InitProgram {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// An executable of one segment (elf(5)).
fn image() -> Vec<u8> {
    let size = HEADERS + CODE.len() as u64;
    let mut image = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    for value in [2 /* ET_EXEC */, MACHINE] {
        image.extend(value.to_le_bytes());
    }
    image.extend(1u32.to_le_bytes());
    for value in [LOAD_ADDRESS + HEADERS, 64, 0] {
        image.extend(value.to_le_bytes()); // entry, program headers, section headers
    }
    image.extend(0u32.to_le_bytes());
    for value in [64u16, 56, 1, 64, 0, 0] {
        image.extend(value.to_le_bytes());
    }
    image.extend(1u32.to_le_bytes()); // PT_LOAD
    image.extend(5u32.to_le_bytes()); // readable, executable
    for value in [0, LOAD_ADDRESS, LOAD_ADDRESS, size, size, 0x1_0000] {
        image.extend(value.to_le_bytes());
    }
    image.extend(CODE);
    image
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_is_one_page_at_most() {
        let image = image();
        assert_eq!(image.len() as u64, HEADERS + CODE.len() as u64);
        assert!(image.len() < 4096);
    }
}
