//! What nvcc's output says about each kernel: the fatbin's entries, and the ELF files in them.
//!
//! A fatbin is a header and one entry per target, each with a header of its own: kind, extents, architecture, flags. An
//! entry of machine code is a 64-bit ELF file, compressed by Zstandard where a flag says so. Of kernel `K` the section
//! `.text.K` names the symbol, under which `.nv.info` lists the registers of a thread; `.nv.info.K` lists more
//! attributes, among them the largest block; and `.nv.shared.K` is as large as the static shared memory, with what the
//! system keeps of each block where the file has a section for that.
//!
//! Nothing here trusts its input: whatever does not fit is an error that says where.

use std::borrow::Cow;
use std::io::Read;

/// What one kernel takes of a multiprocessor, on one architecture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Resources {
    /// The kernel with the suffix of its instance.
    pub kernel: String,
    /// 90 for compute capability 9.0.
    pub architecture: u32,
    /// Of a thread.
    pub registers: u32,
    /// Static shared memory of a block, in bytes.
    pub shared: u32,
    /// Threads of the largest block that it may be launched with; `None` where the code does not say.
    pub threads: Option<u32>,
}

type Outcome<T> = std::result::Result<T, String>;

const MAGIC: u32 = 0xBA55_ED50;
const MACHINE_CODE: u16 = 2;
/// Attributes of `.nv.info` sections, as `cuobjdump` calls them: EIATTR_REGCOUNT and EIATTR_MAX_THREADS.
const REGISTERS: u8 = 0x2f;
const LARGEST_BLOCK: u8 = 5;
/// What the system keeps of each block's shared memory.
const RESERVED_SHARED: u64 = 1 << 10;
const LZ4: u64 = 0x2000;
const ZSTANDARD: u64 = 0x8000;
/// No module of this crate comes near; what claims more is damaged.
const MOST_BYTES: u64 = 64 << 20;

/// The kernels of all machine code in a fatbin, in its order.
pub(crate) fn resources(fatbin: &[u8]) -> Outcome<Vec<Resources>> {
    let header = Reader(fatbin);
    if header.u32(0)? != MAGIC {
        return Err("it does not begin as a fatbin does".into());
    }
    let (first, extent) = (usize::from(header.u16(6)?), header.u64(8)?);
    let mut rest = header.part(first as u64, extent)?;
    let mut kernels = Vec::new();
    while !rest.is_empty() {
        let entry = Reader(rest);
        let (head, payload) = (u64::from(entry.u32(4)?), entry.u64(8)?);
        if head < 0x40 {
            return Err(format!("an entry's header of {head} bytes"));
        }
        if entry.u16(0)? == MACHINE_CODE {
            let stored = match entry.u32(0x10)? {
                0 => payload,
                compressed => u64::from(compressed),
            };
            let flags = entry.u64(0x28)?;
            let elf = unpack(entry.part(head, stored)?, flags, entry.u64(0x38)?)?;
            kernels.extend(kernels_of(&elf, entry.u32(0x1c)?)?);
        }
        let end = head.checked_add(payload).ok_or("an entry without an end")?;
        rest = entry.after(end)?;
    }
    Ok(kernels)
}

fn unpack(stored: &[u8], flags: u64, unpacked: u64) -> Outcome<Cow<'_, [u8]>> {
    if flags & LZ4 != 0 {
        return Err("it is compressed by LZ4, which only older compilers do".into());
    }
    if flags & ZSTANDARD == 0 {
        return Ok(Cow::Borrowed(stored));
    }
    if unpacked > MOST_BYTES {
        return Err(format!("an entry of {unpacked} bytes"));
    }
    let damaged = |error: &dyn std::fmt::Display| format!("compressed code is damaged: {error}");
    let decoder = ruzstd::decoding::StreamingDecoder::new(stored).map_err(|error| damaged(&error))?;
    let mut elf = Vec::new();
    decoder.take(unpacked).read_to_end(&mut elf).map_err(|error| damaged(&error))?;
    if elf.len() as u64 == unpacked {
        Ok(Cow::Owned(elf))
    } else {
        Err(format!("compressed code has {} of {unpacked} bytes", elf.len()))
    }
}

/// A section of an ELF file.
struct Section<'a> {
    name: &'a str,
    info: u32,
    extent: u64,
    /// Empty where the file holds nothing of it, as of shared memory.
    content: &'a [u8],
}

fn kernels_of(elf: &[u8], architecture: u32) -> Outcome<Vec<Resources>> {
    let sections = sections(elf)?;
    let find = |prefix: &str, kernel: &str| {
        sections.iter().find(|section| section.name.strip_prefix(prefix).is_some_and(|name| name == kernel))
    };
    let attributes =
        |prefix: &str, kernel: &str| attributes(find(prefix, kernel).map_or(&[][..], |section| section.content));
    let of_file = attributes(".nv.info", "")?;
    let reserved = if find(".nv.shared.reserved.", "0").is_some() { RESERVED_SHARED } else { 0 };
    let texts = sections.iter().filter_map(|section| Some((section.name.strip_prefix(".text.")?, section)));
    texts
        .map(|(kernel, text)| {
            let symbol = text.info & 0x00ff_ffff;
            let registers = of_file.iter().find_map(|&(attribute, value)| {
                let value = Reader(value);
                let fits = attribute == REGISTERS && value.u32(0) == Ok(symbol);
                fits.then(|| value.u32(4))
            });
            let registers = registers.ok_or_else(|| format!("{kernel}: its registers are not told"))??;
            let shared = find(".nv.shared.", kernel).map_or(0, |section| section.extent.saturating_sub(reserved));
            let shared = u32::try_from(shared).map_err(|_| format!("{kernel}: {shared} bytes of shared memory"))?;
            let own = attributes(".nv.info.", kernel)?;
            let block = own.iter().find(|(attribute, _)| *attribute == LARGEST_BLOCK);
            let threads = block.map(|(_, extents)| threads_of(extents)).transpose()?;
            Ok(Resources { kernel: kernel.to_owned(), architecture, registers, shared, threads })
        })
        .collect()
}

fn sections(elf: &[u8]) -> Outcome<Vec<Section<'_>>> {
    const NO_BITS: u32 = 8;
    let file = Reader(elf);
    if file.part(0, 6)? != b"\x7fELF\x02\x01" {
        return Err("its code is no 64-bit little-endian ELF file".into());
    }
    let (table, size, count) = (file.u64(0x28)?, u64::from(file.u16(0x3a)?), file.u16(0x3c)?);
    if size < 64 {
        return Err(format!("section headers of {size} bytes"));
    }
    let header = |number: u16| -> Outcome<Reader<'_>> {
        let place = (u64::from(number) * size).checked_add(table).ok_or("a section table without an end")?;
        file.part(place, 64).map(Reader)
    };
    let content = |header: &Reader<'_>| file.part(header.u64(24)?, header.u64(32)?);
    let names = content(&header(file.u16(0x3e)?)?)?;
    (0..count)
        .map(|number| {
            let header = header(number)?;
            let content = if header.u32(4)? == NO_BITS { &[][..] } else { content(&header)? };
            let name = text(names, header.u32(0)?)?;
            Ok(Section { name, info: header.u32(44)?, extent: header.u64(32)?, content })
        })
        .collect()
}

fn text(names: &[u8], first: u32) -> Outcome<&str> {
    let rest = names.get(first as usize..).ok_or("a section's name lies outside of the names")?;
    let end = rest.iter().position(|&byte| byte == 0).ok_or("a section's name has no end")?;
    std::str::from_utf8(&rest[..end]).map_err(|_| "a section's name is no text".into())
}

/// The attributes that have a number of bytes as their value. An attribute is its format, its number, and a value: two
/// bytes, or the number of bytes that follow.
fn attributes(content: &[u8]) -> Outcome<Vec<(u8, &[u8])>> {
    const SIZED: u8 = 4;
    let (mut rest, mut found) = (Reader(content), Vec::new());
    while !rest.0.is_empty() {
        let ([format, attribute], value) = (rest.array::<2>(0)?, rest.u16(2)?);
        let size = if format == SIZED { u64::from(value) } else { 0 };
        let bytes = rest.part(4, size)?;
        if format == SIZED {
            found.push((attribute, bytes));
        }
        rest = Reader(rest.after(4 + size)?);
    }
    Ok(found)
}

/// Threads of a block from its extents.
fn threads_of(extents: &[u8]) -> Outcome<u32> {
    let extents = Reader(extents);
    [0, 4, 8].into_iter().try_fold(1u32, |threads, place| {
        threads.checked_mul(extents.u32(place)?).ok_or_else(|| "a block without end".into())
    })
}

/// Little-endian numbers, if they are there.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn part(&self, first: u64, extent: u64) -> Outcome<&'a [u8]> {
        let end = first.checked_add(extent);
        let range = usize::try_from(first).ok().zip(end.and_then(|end| usize::try_from(end).ok()));
        let part = range.and_then(|(first, end)| self.0.get(first..end));
        part.ok_or_else(|| format!("it ends after {} bytes, before byte {first} + {extent}", self.0.len()))
    }

    fn after(&self, first: u64) -> Outcome<&'a [u8]> {
        self.part(first, (self.0.len() as u64).saturating_sub(first))
    }

    fn array<const N: usize>(&self, first: u64) -> Outcome<[u8; N]> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.part(first, N as u64)?);
        Ok(bytes)
    }

    fn u16(&self, first: u64) -> Outcome<u16> {
        self.array(first).map(u16::from_le_bytes)
    }

    fn u32(&self, first: u64) -> Outcome<u32> {
        self.array(first).map(u32::from_le_bytes)
    }

    fn u64(&self, first: u64) -> Outcome<u64> {
        self.array(first).map(u64::from_le_bytes)
    }
}

#[cfg(test)]
mod tests;
