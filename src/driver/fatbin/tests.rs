//! The reader on files put together here, whole, cut short and damaged; and on the images of this build.

use super::*;

/// An ELF file with the sections of one kernel.
fn elf(kernel: &str, registers: u32, shared: u64, threads: [u32; 3]) -> Vec<u8> {
    // A 16-bit value, then the sized attribute of the largest block.
    let mut info = vec![2, 0x1c, 0x34, 0x12, 4, 5, 12, 0];
    info.extend(threads.iter().flat_map(|extent| extent.to_le_bytes()));
    // The registers of symbols 6 and 7.
    let mut of_file = Vec::new();
    for (symbol, registers) in [(6u32, 99), (7, registers)] {
        of_file.extend([4, 0x2f, 8, 0].into_iter().chain(symbol.to_le_bytes()).chain(registers.to_le_bytes()));
    }
    let sections: [(String, u32, u32, u64, &[u8]); 7] = [
        (String::new(), 0, 0, 0, &[]),
        (".names".into(), 3, 0, 0, &[]),
        (format!(".text.{kernel}"), 1, (88 << 24) | 7, 0, &[0; 32]),
        (format!(".nv.shared.{kernel}"), 8, 0, shared + 1024, &[]),
        (".nv.shared.reserved.0".into(), 8, 0, 0, &[]),
        (".nv.info".into(), 0x7000_0000, 0, 0, &of_file),
        (format!(".nv.info.{kernel}"), 0x7000_0000, 0, 0, &info),
    ];
    let names: Vec<u8> = sections.iter().flat_map(|section| section.0.bytes().chain([0])).collect();
    let (mut body, mut headers, mut first_letter) = (Vec::new(), Vec::new(), 0u32);
    for (name, kind, info, extent, content) in &sections {
        let content = if name == ".names" { &names[..] } else { content };
        let extent = if *kind == 8 { *extent } else { content.len() as u64 };
        headers.extend([first_letter, *kind].into_iter().flat_map(u32::to_le_bytes));
        headers.extend([0, 0, 64 + body.len() as u64, extent].into_iter().flat_map(u64::to_le_bytes));
        headers.extend([0, *info].into_iter().flat_map(u32::to_le_bytes));
        headers.extend([0u64, 0].into_iter().flat_map(u64::to_le_bytes));
        body.extend(content);
        first_letter += name.len() as u32 + 1;
    }
    let mut file = b"\x7fELF\x02\x01".to_vec();
    file.resize(64, 0);
    file[0x28..0x30].copy_from_slice(&(64 + body.len() as u64).to_le_bytes());
    for (place, value) in [(0x3a, 64u16), (0x3c, sections.len() as u16), (0x3e, 1)] {
        file[place..place + 2].copy_from_slice(&value.to_le_bytes());
    }
    [file, body, headers].concat()
}

/// A fatbin with one entry.
fn fatbin(kind: u16, architecture: u32, flags: u64, stored: &[u8], unpacked: u64) -> Vec<u8> {
    let payload = stored.len().next_multiple_of(8);
    let mut entry = vec![0; 0x40];
    entry[..2].copy_from_slice(&kind.to_le_bytes());
    entry[4..8].copy_from_slice(&0x40u32.to_le_bytes());
    entry[8..0x10].copy_from_slice(&(payload as u64).to_le_bytes());
    entry[0x10..0x14].copy_from_slice(&(stored.len() as u32).to_le_bytes());
    entry[0x1c..0x20].copy_from_slice(&architecture.to_le_bytes());
    entry[0x28..0x30].copy_from_slice(&flags.to_le_bytes());
    entry[0x38..0x40].copy_from_slice(&unpacked.to_le_bytes());
    entry.extend(stored);
    entry.resize(0x40 + payload, 0);
    let mut file = MAGIC.to_le_bytes().to_vec();
    file.extend([1u16, 16].into_iter().flat_map(u16::to_le_bytes));
    file.extend((entry.len() as u64).to_le_bytes());
    file.extend(entry);
    file
}

/// The simplest Zstandard frame: one block of bytes as they are.
fn zstandard(content: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0xa0];
    frame.extend((content.len() as u32).to_le_bytes());
    frame.extend(&((content.len() as u32) << 3 | 1).to_le_bytes()[..3]);
    frame.extend(content);
    frame
}

fn expected() -> Resources {
    Resources { kernel: "gelu_f32".into(), architecture: 90, registers: 37, shared: 4096, threads: Some(256) }
}

fn whole() -> Vec<u8> {
    elf("gelu_f32", 37, 4096, [64, 2, 2])
}

#[test]
fn registers_shared_memory_and_blocks_are_read() {
    assert_eq!(resources(&fatbin(MACHINE_CODE, 90, 0, &whole(), 0)).unwrap(), [expected()]);
}

#[test]
fn compressed_code_is_read() {
    let packed = zstandard(&whole());
    let file = fatbin(MACHINE_CODE, 90, ZSTANDARD, &packed, whole().len() as u64);
    assert_eq!(resources(&file).unwrap(), [expected()]);
}

#[test]
fn ptx_has_no_resources() {
    assert_eq!(resources(&fatbin(1, 80, 0, b".version 9.0", 0)).unwrap(), []);
}

#[test]
fn two_entries_are_two_architectures() {
    let (mut first, second) = (fatbin(MACHINE_CODE, 80, 0, &whole(), 0), fatbin(MACHINE_CODE, 90, 0, &whole(), 0));
    first.extend(&second[16..]);
    let extent = (first.len() - 16) as u64;
    first[8..16].copy_from_slice(&extent.to_le_bytes());
    let found: Vec<u32> = resources(&first).unwrap().iter().map(|kernel| kernel.architecture).collect();
    assert_eq!(found, [80, 90]);
}

#[test]
fn a_file_cut_anywhere_is_an_error() {
    for file in [
        fatbin(MACHINE_CODE, 90, 0, &whole(), 0),
        fatbin(MACHINE_CODE, 90, ZSTANDARD, &zstandard(&whole()), whole().len() as u64),
    ] {
        for end in 0..file.len() {
            assert!(resources(&file[..end]).is_err(), "{end} of {} bytes", file.len());
        }
    }
}

#[test]
fn any_damaged_byte_is_an_answer_or_an_error() {
    for file in [
        fatbin(MACHINE_CODE, 90, 0, &whole(), 0),
        fatbin(MACHINE_CODE, 90, ZSTANDARD, &zstandard(&whole()), whole().len() as u64),
    ] {
        for place in 0..file.len() {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut damaged = file.clone();
                damaged[place] = value;
                // That it comes back is what is tested.
                let _ = resources(&damaged);
            }
        }
    }
}

#[test]
fn what_is_refused_says_why() {
    let refusal = |file: &[u8]| resources(file).unwrap_err();
    assert!(refusal(b"\x7fELF and so on").contains("fatbin"));
    assert!(refusal(&fatbin(MACHINE_CODE, 90, 0, &[0; 80], 0)).contains("ELF"));
    assert!(refusal(&fatbin(MACHINE_CODE, 90, LZ4, &whole(), 0)).contains("LZ4"));
    assert!(refusal(&fatbin(MACHINE_CODE, 90, ZSTANDARD, &zstandard(&whole()), 1 << 40)).contains("1099511627776"));
    assert!(refusal(&fatbin(MACHINE_CODE, 90, ZSTANDARD, b"nonsense", 8)).contains("damaged"));
    let longer = whole().len() as u64 + 1;
    assert!(refusal(&fatbin(MACHINE_CODE, 90, ZSTANDARD, &zstandard(&whole()), longer)).contains("bytes"));
    let endless = elf("gelu_f32", 37, 4096, [1 << 20, 1 << 20, 1]);
    assert!(refusal(&fatbin(MACHINE_CODE, 90, 0, &endless, 0)).contains("block"));
}

/// The compiler's own report, which the build leaves beside the images, says the same of every kernel.
#[test]
fn images_of_this_build_agree_with_the_compilers_report() {
    for (module, image) in crate::driver::image::images() {
        let path = format!("{}/{module}.ptxas", env!("OUT_DIR"));
        let report = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
        let mut reported = 0;
        let found = resources(image).unwrap_or_else(|error| panic!("{module}: {error}"));
        for kernel in report.split("Compiling entry function '").skip(1) {
            let (name, rest) = kernel.split_once('\'').unwrap();
            let target = rest.split('\'').nth(1).unwrap().trim_start_matches("sm_").trim_end_matches('a');
            let number_before = |word: &str| -> Option<u32> {
                let (before, _) = rest.split_once(word)?;
                before.trim_end().rsplit([' ', ',']).next()?.parse().ok()
            };
            let resources = found.iter().find(|r| r.kernel == name && r.architecture.to_string() == target);
            let resources = resources.unwrap_or_else(|| panic!("{module}: no {name} for {target}"));
            assert_eq!(Some(resources.registers), number_before("registers"), "{name} for {target}");
            assert_eq!(resources.shared, number_before("bytes smem").unwrap_or(0), "{name} for {target}");
            assert!(resources.threads.is_none_or(|threads| (1..=1024).contains(&threads)), "{name}");
            reported += 1;
        }
        assert_eq!(found.len(), reported, "{module}");
    }
}
