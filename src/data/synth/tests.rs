use super::scene::{Color, Place, Scene, Shape, held_out};
use super::text::{Kind, NONE};
use super::*;
use std::collections::BTreeSet;
use tokenizers::Tokenizer;

const N: usize = 160;

/// One output folder for all tests that only read it.
fn made() -> &'static (tempfile::TempDir, Manifest) {
    static MADE: std::sync::OnceLock<(tempfile::TempDir, Manifest)> = std::sync::OnceLock::new();
    MADE.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let manifest = shapes(dir.path(), N, 7).unwrap();
        (dir, manifest)
    })
}

fn read(name: &str) -> Vec<Value> {
    let text = fs::read_to_string(made().0.path().join(name)).unwrap();
    match name.ends_with("l") {
        true => text.lines().map(|l| serde_json::from_str(l).unwrap()).collect(),
        false => serde_json::from_str(&text).unwrap(),
    }
}

fn turns(record: &Value) -> Vec<(String, String)> {
    let text = |v: &Value| v["value"].as_str().unwrap().to_string();
    let turns = record["conversations"].as_array().unwrap();
    assert!(turns.iter().enumerate().all(|(i, t)| t["from"] == ["human", "gpt"][i % 2]));
    turns.chunks(2).map(|t| (text(&t[0]), text(&t[1]))).collect()
}

/// Every file of samples, with the number of its records.
fn sample_files() -> Vec<(&'static str, usize)> {
    let files = made().1.files.iter();
    files.filter(|(f, _)| f.contains(".json") && !f.contains('/')).map(|(f, e)| (f.as_str(), e.records)).collect()
}

#[test]
fn same_seed_same_bytes_and_another_seed_others() {
    let dir = tempfile::tempdir().unwrap();
    let again = shapes(dir.path(), N, 7).unwrap();
    assert_eq!(&again, &made().1);
    for name in again.files.keys().filter(|f| f.contains(".json")) {
        assert_eq!(fs::read(dir.path().join(name)).unwrap(), fs::read(made().0.path().join(name)).unwrap(), "{name}");
    }
    let other = shapes(dir.path(), N, 8).unwrap();
    for (name, entry) in other.files.iter().filter(|(f, _)| !f.starts_with("tokenizer/")) {
        assert_ne!(entry.sha256, made().1.files[name].sha256, "{name}");
    }
}

/// The committed backbones were trained on such pictures and words: a change here asks for new ones.
#[test]
fn bytes_are_those_that_the_backbones_know() {
    let scene = Scene::draw(&mut Rng::new(1, Stream::Scene, 0, 0), false);
    let pixels = FileEntry::new(1, [raster::render(&scene, &mut pixels_rng(0)).as_slice()]).sha256;
    let of = |name: &str| made().1.files[name].sha256.clone();
    let found = [pixels, of("questions_train.json"), of("text_train.json"), of("tokenizer/tokenizer.json")];
    let known = ["8164fef956cc080d", "b6f1de1382ebe9f4", "80d9007fbc1229cd", "5935aea1766400cb"];
    assert_eq!(found.each_ref().map(|hash| &hash[..16]), known);
}

fn pixels_rng(i: usize) -> Rng {
    Rng::new(1, Stream::Pixels, 0, i)
}

#[test]
fn a_sample_does_not_depend_on_how_many_there_are() {
    let dir = tempfile::tempdir().unwrap();
    shapes(dir.path(), 20, 7).unwrap();
    let few: Vec<Value> = serde_json::from_slice(&fs::read(dir.path().join("questions_train.json")).unwrap()).unwrap();
    assert_eq!(few[..], read("questions_train.json")[..20]);
    for i in 0..20 {
        let png = Split::Train.image(i);
        assert_eq!(fs::read(dir.path().join(&png)).unwrap(), fs::read(made().0.path().join(&png)).unwrap());
    }
}

fn names_held_out(text: &str) -> bool {
    scene::HELD_OUT.iter().any(|(c, s)| text.contains(&format!("{} {}", c.word(), s.word())))
}

#[test]
fn training_never_shows_or_names_a_held_out_combination() {
    for (file, _) in sample_files() {
        let unseen = read(file).iter().any(|r| names_held_out(&r.to_string()));
        assert_eq!(unseen, file == "questions_val_unseen.json", "{file}");
    }
    for split in [Split::Train, Split::ValSeen] {
        let pictures = Pictures::draw(3, split, 2000);
        assert!(pictures.scenes.iter().flat_map(|s| &s.objects).all(|o| !o.held_out()));
    }
    let unseen = Pictures::draw(3, Split::ValUnseen, 500);
    assert!(unseen.scenes.iter().all(|s| s.objects.iter().filter(|o| o.held_out()).count() == 1));
    // Nor does a rejected answer together with its question, e.g. "what shape is red?" "triangle".
    for r in read("preferences_train.jsonl") {
        let (prompt, rejected) = (r["prompt"].as_str().unwrap(), r["rejected"].as_str().unwrap());
        let color = Color::ALL.iter().find(|c| prompt.contains(&format!("is {}", c.word())));
        let shape = Shape::ALL.iter().find(|s| s.word() == rejected);
        assert!(!matches!((color, shape), (Some(&c), Some(&s)) if held_out(c, s)), "{r}");
    }
}

#[test]
fn scenes_are_varied_and_well_formed() {
    let scenes = Pictures::draw(5, Split::Train, 4000).scenes;
    let mut combinations = BTreeSet::new();
    let mut by_number = [0; 4];
    for scene in &scenes {
        by_number[scene.objects.len()] += 1;
        assert!(scene.objects.windows(2).all(|w| w[0].place < w[1].place), "reading order, one object a place");
        for o in &scene.objects {
            assert_eq!(scene.objects.iter().filter(|p| p.name() == o.name()).count(), 1);
            combinations.insert((o.color, o.shape, o.place));
        }
    }
    assert_eq!(combinations.len(), 21 * 4);
    assert!(by_number[0] == 0 && by_number[1..].iter().all(|&k| k > 1200), "{by_number:?}");
}

/// Reads the caption back and answers every question from it, by other code than that which made the answer.
#[test]
fn answers_agree_with_the_captions() {
    let facts = |file: &str| -> Vec<Vec<[String; 3]>> {
        let parse = |r: &Value| {
            let caption = turns(r)[0].1.clone();
            let object = |part: &str| {
                let w: Vec<_> = part.split(' ').collect();
                [w[1].to_string(), w[2].to_string(), w[3].to_string()]
            };
            caption.trim_end_matches('.').split(", ").map(object).collect()
        };
        read(file).iter().map(parse).collect()
    };
    let mut asked = 0;
    for (captions, questions) in
        [("captions_train.json", "questions_train.json"), ("captions_val.json", "questions_val_seen.json")]
    {
        for (objects, record) in facts(captions).iter().zip(read(questions)) {
            for (prompt, answer) in turns(&record) {
                let prompt = prompt.trim_start_matches("<image>\n").trim_end_matches('?').to_string();
                assert_eq!(answer_from(objects, &prompt).as_ref(), Some(&answer), "{objects:?} {prompt}");
                asked += 1;
            }
        }
    }
    assert!(asked > 2 * N, "{asked}");
}

fn answer_from(objects: &[[String; 3]], prompt: &str) -> Option<String> {
    let numbers = ["zero", "one", "two", "three"];
    let only = |i: usize, word: &str, j: usize| {
        let mut found = objects.iter().filter(|o| o[i] == word);
        let answer = found.next().map(|o| o[j].clone());
        assert!(found.next().is_none(), "ambiguous: {prompt}");
        answer
    };
    let words: Vec<&str> = prompt.split(' ').collect();
    let named = |o: &&[String; 3]| prompt.ends_with(&format!("{} {}", o[0], o[1]));
    match words[..] {
        ["what", "color", "is", "the", shape] => only(1, shape, 0),
        ["what", what, "is", place] if place.contains('-') => only(2, place, usize::from(what == "shape")),
        ["what", "shape", "is", color] => only(0, color, 1),
        ["where", ..] => objects.iter().find(named).map(|o| o[2].clone()),
        ["is", "there", ..] => objects.iter().find(named).map(|o| format!("yes, a {} {} {}", o[0], o[1], o[2])),
        ["how", "many", "shapes"] => Some(numbers[objects.len()].into()),
        ["how", "many", plural] => {
            let shape = Shape::ALL.iter().find(|s| s.plural() == plural)?;
            Some(numbers[objects.iter().filter(|o| o[1] == shape.word()).count()].into())
        }
        _ => None,
    }
}

#[test]
fn questions_about_the_absent_are_about_the_absent() {
    let captions = read("captions_train.json");
    for (i, pair) in read("preferences_train.jsonl").iter().enumerate() {
        let caption = turns(&captions[i])[0].1.clone();
        let prompt = pair["prompt"].as_str().unwrap().trim_start_matches("<image>\n").trim_end_matches('?').to_string();
        assert_eq!(pair["chosen"], NONE);
        assert_ne!(pair["rejected"], NONE);
        let asked = prompt.trim_start_matches("is there a ").trim_start_matches("what shape is ").to_string();
        assert!(!caption.contains(&asked), "{caption} {prompt}");
    }
    for r in read("absent_val.json") {
        let phrases: Vec<&str> = r["absent"].as_array().unwrap().iter().map(|p| p.as_str().unwrap()).collect();
        assert!(!phrases.is_empty() && phrases.iter().all(|p| !NONE.contains(p)));
        assert_eq!(turns(&r)[0].1, NONE);
    }
    // The counterweight pairs are the other way round.
    assert!(read("presence_train.jsonl").iter().all(|r| r["rejected"] == NONE && r["chosen"] != NONE));
}

#[test]
fn every_kind_is_asked_and_ids_and_pictures_are_there() {
    for (file, records) in sample_files() {
        let samples = read(file);
        assert_eq!(samples.len(), records, "{file}");
        let ids: BTreeSet<&str> = samples.iter().map(|r| r["id"].as_str().unwrap()).collect();
        assert_eq!(ids.len(), samples.len(), "{file}: ids repeat");
        for r in samples.iter().filter(|r| !r["image"].is_null()) {
            let path = made().0.path().join(r["image"].as_str().unwrap());
            assert!(path.is_file(), "{}", path.display());
        }
    }
    for file in ["questions_val_seen.json", "questions_val_unseen.json", "text_val.json"] {
        let samples = read(file);
        let kinds: BTreeSet<&str> = samples.iter().map(|r| r["category"].as_str().unwrap()).collect();
        assert!(Kind::ALL.iter().all(|k| kinds.contains(k.name())), "{file}: {kinds:?}");
        assert!(samples.iter().all(|r| turns(r).len() == 1));
    }
}

#[test]
fn every_text_is_in_the_vocabulary_and_survives_the_round_trip() {
    let tokenizer = Tokenizer::from_file(made().0.path().join("tokenizer/tokenizer.json")).unwrap();
    assert!(tokenizer.get_vocab_size(true) <= MAX_VOCAB);
    let specials = tokenizer::SPECIALS;
    assert!(specials.iter().enumerate().all(|(i, s)| tokenizer.token_to_id(s) == Some(i as u32)));
    let ids = |text: &str| tokenizer.encode(text, false).unwrap().get_ids().to_vec();
    for (file, _) in sample_files() {
        for r in read(file) {
            let texts = match r.get("conversations") {
                Some(_) => turns(&r).into_iter().flat_map(|(q, a)| [q, a]).collect::<Vec<_>>(),
                None => ["prompt", "chosen", "rejected"].map(|k| r[k].as_str().unwrap().to_string()).to_vec(),
            };
            for text in texts {
                let ids = ids(&text);
                assert!(!ids.is_empty() && !ids.contains(&0), "{file}: {text}");
                let plain = text.trim_start_matches("<image>\n");
                assert_eq!(tokenizer.decode(&ids, true).unwrap(), plain, "{file}");
            }
        }
    }
    // A role is one word, and the end token is found right behind an answer.
    assert_eq!(ids(" USER: <image>\nWhere is the red circle? ASSISTANT: top-left</s>").len(), 11);
}

#[test]
fn pictures_show_what_the_scene_says() {
    let scene = Scene {
        objects: vec![
            scene::Object { color: Color::Red, shape: Shape::Square, place: Place::TopLeft },
            scene::Object { color: Color::Cyan, shape: Shape::Cross, place: Place::BottomRight },
        ],
    };
    for i in 0..50 {
        let rgb = raster::render(&scene, &mut pixels_rng(i));
        assert_eq!(rgb.len(), PIXELS * PIXELS * 3);
        let at =
            |x: usize, y: usize| rgb[3 * (y * PIXELS + x)..][..3].iter().map(|&v| i32::from(v)).collect::<Vec<_>>();
        let (red, cyan, empty) = (at(12, 12), at(36, 36), at(36, 12));
        assert!(red[0] > 150 && red[1] < 90 && red[2] < 90, "{red:?}");
        assert!(cyan[0] < 90 && cyan[1] > 150 && cyan[2] > 150, "{cyan:?}");
        assert!((empty[0] - empty[1]).abs() < 50 && (empty[1] - empty[2]).abs() < 50, "{empty:?}");
        // An arm of the cross does not reach the corner of its cell.
        let corner = at(46, 25);
        assert!((corner[0] - corner[1]).abs() < 50, "{corner:?}");
    }
}

#[test]
fn files_of_others_are_not_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    for name in ["captions_val.json", "images/train/00002.png", "manifest.json", "tokenizer/tokenizer.json"] {
        std::fs::create_dir_all(at(name).parent().unwrap()).unwrap();
        std::fs::write(at(name), "mine").unwrap();
        let report = shapes(dir.path(), 4, 1).unwrap_err().report();
        assert!(report.contains(name) && report.contains("hint: choose another folder"), "{report}");
        assert_eq!(std::fs::read(at(name)).unwrap(), b"mine");
        std::fs::remove_file(at(name)).unwrap();
    }
    std::fs::write(at("notes.txt"), "mine").unwrap();
    let manifest = shapes(dir.path(), 4, 1).unwrap();
    // The same again, more of it, and what was begun but not finished: all that is ours.
    shapes(dir.path(), 4, 1).unwrap();
    shapes(dir.path(), 6, 1).unwrap();
    std::fs::remove_file(at("text_val.json")).unwrap();
    let begun = Manifest { n: 6, files: BTreeMap::new(), ..manifest };
    std::fs::write(at("manifest.json"), serde_json::to_string(&begun).unwrap()).unwrap();
    assert!(!is_complete(dir.path(), 4, 1).unwrap());
    std::fs::write(at("captions_val.json"), "[").unwrap();
    shapes(dir.path(), 6, 1).unwrap();
    assert!(is_complete(dir.path(), 6, 1).unwrap() && at("notes.txt").exists());
    // Changed since it was made.
    for name in ["captions_val.json", "images/train/00002.png"] {
        let old = std::fs::read(at(name)).unwrap();
        std::fs::write(at(name), "mended by hand").unwrap();
        let told = if name.starts_with("images") { "images/train" } else { name };
        let report = shapes(dir.path(), 6, 1).unwrap_err().report();
        assert!(report.contains(told) && report.contains("changed since"), "{report}");
        assert_eq!(std::fs::read(at(name)).unwrap(), b"mended by hand");
        std::fs::write(at(name), old).unwrap();
    }
}

#[test]
fn a_folder_grows_and_shrinks_around_files_of_others() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join("images/train").join(name);
    shapes(dir.path(), 4, 1).unwrap();
    // Under a name that more pictures would take.
    std::fs::write(at("00005.png"), "mine").unwrap();
    let report = shapes(dir.path(), 6, 1).unwrap_err().report();
    assert!(report.contains("images/train/00005.png") && !report.contains("00004.png"), "{report}");
    assert_eq!(std::fs::read(at("00005.png")).unwrap(), b"mine");
    // In a folder that was begun, likewise.
    let begun = Manifest { kind: "shapes".into(), n: 4, seed: 1, files: BTreeMap::new() };
    std::fs::write(dir.path().join("manifest.json"), serde_json::to_string(&begun).unwrap()).unwrap();
    assert!(shapes(dir.path(), 6, 1).unwrap_err().report().contains("00005.png"));
    std::fs::remove_file(at("00005.png")).unwrap();
    shapes(dir.path(), 6, 1).unwrap();
    // Fewer pictures leave none behind, so that more of another seed stand in no one's way.
    std::fs::write(at("notes.txt"), "mine").unwrap();
    shapes(dir.path(), 2, 1).unwrap();
    assert_eq!(std::fs::read_dir(at("")).unwrap().count(), 3);
    shapes(dir.path(), 6, 2).unwrap();
    // One is gone and another changed: the changed one stays.
    std::fs::remove_file(at("00001.png")).unwrap();
    shapes(dir.path(), 6, 2).unwrap();
    std::fs::remove_file(at("00001.png")).unwrap();
    std::fs::write(at("00003.png"), "mended by hand").unwrap();
    assert!(shapes(dir.path(), 6, 2).unwrap_err().report().contains("images/train"));
    assert_eq!(std::fs::read(at("00003.png")).unwrap(), b"mended by hand");
}

#[test]
fn refuses_what_it_cannot_make() {
    let dir = tempfile::tempdir().unwrap();
    assert!(shapes(dir.path(), 0, 1).unwrap_err().report().contains("hint: choose a number"));
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let message = shapes(&file, 4, 1).unwrap_err().report();
    assert!(message.contains("cannot write") && message.contains("file"), "{message}");
}
