//! The German Traffic Sign Recognition Benchmark (Stallkamp et al. 2012) as published: PPM files and one CSV a folder.

use std::path::{Component, Path, PathBuf};

use super::folder::ImageFiles;
use super::{Split, read};
use crate::{Error, Result};

/// What the 43 signs say, by label.
#[rustfmt::skip]
pub(super) const CLASS_NAMES: [&str; 43] = [
    "speed limit 20", "speed limit 30", "speed limit 50", "speed limit 60", "speed limit 70", "speed limit 80",
    "end of speed limit 80", "speed limit 100", "speed limit 120", "no passing", "no passing for heavy vehicles",
    "right of way at next intersection", "priority road", "yield", "stop", "no vehicles", "no heavy vehicles",
    "no entry", "general caution", "dangerous curve left", "dangerous curve right", "double curve", "bumpy road",
    "slippery road", "road narrows on the right", "road work", "traffic signals", "pedestrians", "children crossing",
    "bicycles crossing", "ice or snow", "wild animals crossing", "end of all limits", "turn right ahead",
    "turn left ahead", "ahead only", "straight or right", "straight or left", "keep right", "keep left", "roundabout",
    "end of no passing", "end of no passing for heavy vehicles",
];

const HEADER: &str = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId";

/// The set in `root`, which holds `Final_Training` and `Final_Test`. Images are whole: the CSV's region of interest is
/// not cut out.
pub(super) fn open(root: &Path, name: &str, split: Split) -> Result<ImageFiles> {
    let mut files = Vec::new();
    match split {
        Split::Train => {
            let folder = root.join("Final_Training").join("Images");
            for class in read::folder(&folder)?.into_iter().filter(|entry| entry.is_folder) {
                let number = class.name.to_str().and_then(|name| name.parse::<usize>().ok());
                let label = number
                    .filter(|label| *label < CLASS_NAMES.len())
                    .ok_or_else(|| Error::format(&class.path, "class folder is not a number from 00000 to 00042"))?;
                list(&class.path, &format!("GT-{label:05}.csv"), Some(label), &mut files)?;
            }
        }
        Split::Test => list(&root.join("Final_Test").join("Images"), "GT-final_test.csv", None, &mut files)?,
    }
    if files.is_empty() {
        return Err(Error::format(root, format!("GTSRB without a sample for {split:?}")));
    }
    Ok(ImageFiles::new(name, CLASS_NAMES.iter().map(|name| name.to_string()).collect(), files))
}

/// Appends the files that the CSV of `folder` lists. All files there must be listed, and all listed be there.
fn list(folder: &Path, csv: &str, class: Option<usize>, files: &mut Vec<(PathBuf, usize)>) -> Result<()> {
    let csv = folder.join(csv);
    let listed = parse(&read::text(&csv)?, &csv, class)?;
    let is_ppm = |path: &Path| path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("ppm"));
    let present = read::folder(folder)?.iter().filter(|entry| is_ppm(&entry.path)).count();
    if present != listed.len() {
        return Err(Error::format(&csv, format!("lists {} images, the folder has {present}", listed.len())));
    }
    for (name, label) in listed {
        let path = folder.join(&name);
        if !path.is_file() {
            return Err(Error::format(&csv, format!("lists {name:?}, which is not in the folder")));
        }
        files.push((path, label));
    }
    Ok(())
}

/// File names and labels of a CSV; with `class`, every label must be that.
fn parse(text: &str, path: &Path, class: Option<usize>) -> Result<Vec<(String, usize)>> {
    let mut lines = text.split_inclusive('\n');
    let header = lines.next().unwrap_or_default();
    if header.trim() != HEADER {
        return Err(Error::format_at(path, 0, format!("header {:?}, expected {HEADER:?}", header.trim())));
    }
    let mut offset = header.len() as u64;
    let mut rows: Vec<(String, usize)> = Vec::new();
    for line in lines {
        let wrong = |reason: String| Error::format_at(path, offset, reason);
        let row = line.trim();
        if !row.is_empty() {
            let fields: Vec<&str> = row.split(';').collect();
            let [name, _, _, _, _, _, _, label] = fields[..] else {
                return Err(wrong(format!("row with {} fields, expected 8", fields.len())));
            };
            let mut components = Path::new(name).components();
            let is_plain = matches!(components.next(), Some(Component::Normal(_))) && components.next().is_none();
            if !is_plain {
                return Err(wrong(format!("{name:?} is not a plain file name")));
            }
            let known = label.parse::<usize>().ok().filter(|label| *label < CLASS_NAMES.len());
            let label = known.ok_or_else(|| wrong(format!("class {label:?}, expected 0 to 42")))?;
            if class.is_some_and(|class| class != label) {
                return Err(wrong(format!("class {label} in the folder of class {}", class.unwrap_or_default())));
            }
            rows.push((name.to_string(), label));
        }
        offset += line.len() as u64;
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_give_names_and_labels() {
        let text = format!("{HEADER}\r\n00000_00013.ppm;40;39;6;5;35;34;7\r\n\r\n");
        assert_eq!(parse(&text, Path::new("a.csv"), Some(7)).unwrap(), [("00000_00013.ppm".to_string(), 7)]);
    }

    #[test]
    fn bad_rows_are_located() {
        let start = HEADER.len() as u64 + 1;
        for row in ["a.ppm;1;2;3", "../a.ppm;1;1;1;1;1;1;7", ";1;1;1;1;1;1;7", "a.ppm;1;1;1;1;1;1;43", "a.ppm;;;;;;;8"]
        {
            match parse(&format!("{HEADER}\n{row}\n"), Path::new("a.csv"), Some(7)) {
                Err(Error::Format { offset, .. }) => assert_eq!(offset, Some(start), "{row}"),
                other => panic!("{row}: {other:?}"),
            }
        }
        assert!(parse("Filename;ClassId\n", Path::new("a.csv"), None).is_err());
    }
}
