//! Input that is made to hurt: memory and time stay bounded, and what is wrong is told.

/// Data files and pictures that never end, are no files, or ask for more memory than they are worth.
#[cfg(unix)]
mod data {
    use super::super::folder::{Folder, golden, said};
    use serde_json::json;
    use std::fs;
    use std::io::Write;
    use std::path::{Path, PathBuf};
    use std::process::{Command, Output, Stdio};
    use std::time::{Duration, Instant};

    /// A process that must end within a minute.
    fn bounded(mut command: Command) -> Output {
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let started = Instant::now();
        while child.try_wait().unwrap().is_none() {
            if started.elapsed() > Duration::from_secs(60) {
                child.kill().unwrap();
                panic!("it does not end");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        child.wait_with_output().unwrap()
    }

    /// `adfreeze score` on a data file and a folder of pictures, within 6 GB of addresses.
    fn score(f: &Folder, data: &Path, images: &Path) -> Output {
        let mut c = f.command("bash");
        // The binary's threads reserve addresses; what is refused here asks for far more.
        c.args(["-c", "ulimit -v 6000000; exec \"$0\" \"$@\"", super::super::folder::BINARY, "score", "--model"]);
        c.arg(golden("model")).arg("--data").arg(data).arg("--images").arg(images).args(["--out", "s.jsonl"]);
        c.env("RAYON_NUM_THREADS", "2");
        bounded(c)
    }

    #[track_caller]
    fn refused(out: Output, parts: &[&str]) {
        let said = said(out);
        assert_eq!(said.code, Some(1), "{}", said.stderr);
        for part in [&["error: ", "\n\nhint: "], parts].concat() {
            assert!(said.stderr.contains(part), "`{part}` is not in:\n{}", said.stderr);
        }
        assert!(!said.stderr.contains("panicked") && said.stderr.len() < 3000, "{}", said.stderr);
    }

    fn sparse(path: &Path, begin: &[u8], bytes: u64) {
        let mut file = fs::File::create(path).unwrap();
        file.write_all(begin).unwrap();
        file.set_len(bytes).unwrap();
    }

    fn fifo(path: &Path) {
        assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
    }

    /// One sample that shows a picture.
    fn shows(f: &Folder, image: &str) -> PathBuf {
        let turns = json!([{ "from": "human", "value": "<image>\nWhat?" }, { "from": "gpt", "value": "A circle." }]);
        f.write("d.json", &json!([{ "id": "x", "image": image, "conversations": turns }]).to_string())
    }

    #[test]
    fn data_that_are_no_file_or_never_end() {
        let f = Folder::new();
        let images = golden("images");
        fifo(&f.path("pipe"));
        refused(score(&f, &f.path("pipe"), &images), &["pipe: it is a pipe, not a file", "copy what is in it"]);
        refused(score(&f, Path::new("/dev/zero"), &images), &["/dev/zero: it is a device, not a file"]);
        refused(score(&f, Path::new("/dev/null"), &images), &["/dev/null: it is a device, not a file"]);
        refused(score(&f, f.path("").as_path(), &images), &["it is a folder, not a file", "JSON lines file"]);
        std::os::unix::fs::symlink("loop", f.path("loop")).unwrap();
        refused(score(&f, &f.path("loop"), &images), &["cannot read the data file"]);
        sparse(&f.path("zeros"), b"", 20 << 30);
        refused(score(&f, &f.path("zeros"), &images), &["zeros is no text: it has zero bytes"]);
        let padded = [b"[".to_vec(), vec![b' '; 5000]].concat();
        sparse(&f.path("list"), &padded, 20 << 30);
        refused(score(&f, &f.path("list"), &images), &["list has 20 GiB", "JSON lines"]);
        let line = [b"{\"id\": \"".to_vec(), vec![b'a'; 5000]].concat();
        sparse(&f.path("line"), &line, 20 << 30);
        refused(score(&f, &f.path("line"), &images), &["line, line 1 is longer than 64 MiB"]);
        for (name, text) in [("deep", "[".repeat(200_000)), ("deeper", format!("[{{\"x\":{}", "[".repeat(200_000)))] {
            refused(score(&f, &f.write(name, &text), &images), &[name, "a sample looks like"]);
        }
    }

    #[test]
    fn pictures_that_are_no_file_or_never_end() {
        let f = Folder::new();
        let dir = f.path("images");
        fs::create_dir(&dir).unwrap();
        fifo(&dir.join("pipe.png"));
        refused(score(&f, &shows(&f, "pipe.png"), &dir), &["sample x", "pipe.png is a pipe, not a file"]);
        refused(score(&f, &shows(&f, "/dev/zero"), &dir), &["sample x", "/dev/zero is a device, not a file"]);
        refused(score(&f, &shows(&f, "."), &dir), &["sample x", "is a folder, not a file"]);
        sparse(&dir.join("zeros.png"), b"", 20 << 30);
        refused(score(&f, &shows(&f, "zeros.png"), &dir), &["zeros.png: neither PNG nor JPEG"]);
        let png = fs::read(golden("images/exact0.png")).unwrap();
        sparse(&dir.join("tail.png"), &png, 20 << 30);
        refused(score(&f, &shows(&f, "tail.png"), &dir), &["tail.png: 20480 MiB are too many for"]);
    }

    /// A PNG of one colour, as a file of some kilobytes.
    fn png(width: u32, height: u32) -> Vec<u8> {
        let mut out = vec![];
        let mut encoder = png::Encoder::new(&mut out, width, height);
        encoder.set_color(png::ColorType::Grayscale);
        let mut writer = encoder.write_header().unwrap();
        let mut stream = writer.stream_writer().unwrap();
        let row = vec![7; width as usize];
        for _ in 0..height {
            stream.write_all(&row).unwrap();
        }
        stream.finish().unwrap();
        drop(writer);
        out
    }

    /// Puts a chunk behind a PNG's header.
    fn with_chunk(png: &[u8], kind: &[u8; 4], body: &[u8]) -> Vec<u8> {
        let length = (body.len() as u32).to_be_bytes();
        // Its checksum is wrong: nobody looks.
        [&png[..33], &length, kind, body, &[0; 4], &png[33..]].concat()
    }

    #[test]
    fn texts_and_profiles_of_hundreds_of_megabytes_are_not_unpacked() {
        let f = Folder::new();
        let dir = f.path("images");
        fs::create_dir(&dir).unwrap();
        let mut packed = flate2::write::ZlibEncoder::new(vec![], flate2::Compression::fast());
        let part = vec![0; 1 << 20];
        (0..256).for_each(|_| packed.write_all(&part).unwrap());
        let packed = packed.finish().unwrap();
        let whole = fs::read(golden("images/exact0.png")).unwrap();
        for (kind, key) in [
            (b"iCCP", &b"k\0\0"[..]),
            (b"zTXt", b"k\0\0"),
            (b"zTXt", b"Raw profile type exif\0\0"),
            (b"iTXt", b"XML:com.adobe.xmp\0\x01\0\0\0"),
        ] {
            fs::write(dir.join("bomb.png"), with_chunk(&whole, kind, &[key, &packed].concat())).unwrap();
            let out = said(score(&f, &shows(&f, "bomb.png"), &dir));
            assert_eq!(out.code, Some(0), "{}", out.stderr);
        }
    }

    #[test]
    fn pictures_of_too_many_pixels_are_refused_and_large_ones_wait_for_each_other() {
        let f = Folder::new();
        let dir = f.path("images");
        fs::create_dir(&dir).unwrap();
        let small = png(8, 8);
        let claims = |width: u32, height: u32| {
            [&small[..16], &width.to_be_bytes(), &height.to_be_bytes(), &small[24..]].concat()
        };
        for (width, height) in [(100_000, 100_000), (0, 5), (14_000, 14_000)] {
            fs::write(dir.join("b.png"), claims(width, height)).unwrap();
            refused(
                score(&f, &shows(&f, "b.png"), &dir),
                &["b.png", &format!("{width} × {height} pixels"), "scale the picture down"],
            );
        }
        // Four of 36 megapixels, one after the other: 108 MB of RGB each, with a budget of 64 MiB.
        let large = png(6000, 6000);
        let turns = json!([{ "from": "human", "value": "<image>\nWhat?" }, { "from": "gpt", "value": "A circle." }]);
        let samples: Vec<_> = (0..4).map(|i| json!({ "image": format!("{i}.png"), "conversations": turns })).collect();
        (0..4).for_each(|i| fs::write(dir.join(format!("{i}.png")), &large).unwrap());
        let data = f.write("four.json", &json!(samples).to_string());
        let run = |mib: &str| {
            let mut c = f.adfreeze(["score", "--out", "s.jsonl", "--model"]);
            c.arg(golden("model")).arg("--data").arg(&data).arg("--images").arg(&dir);
            bounded({
                c.env("RAYON_NUM_THREADS", "4").env("ADFREEZE_DECODE_MIB", mib);
                c
            })
        };
        let out = said(run("64"));
        assert_eq!(out.code, Some(0), "{}", out.stderr);
        assert_eq!(fs::read_to_string(f.path("s.jsonl")).unwrap().lines().count(), 4);
        refused(run("lots"), &["ADFREEZE_DECODE_MIB is no number of MiB", "ADFREEZE_DECODE_MIB=2048"]);
    }
}
