//! Tokenizers and chat templates as transformers has them.

use super::folder::{CONSTANT, Folder, golden};
use adfreeze::data::source::{Conversation, Picture, Role, Turn};
use adfreeze::data::template::{ChatTemplate, Rendered, Source};
use adfreeze::error::Result;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};

fn case(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases").join(name)
}

/// The golden model in the folder `model`, with some of its files replaced by those of `from`.
fn model_with(f: &Folder, from: &Path) {
    let model = f.model("model", |_| ());
    for entry in fs::read_dir(from).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_file()) {
        if entry.file_name().unwrap() != "data.json" {
            fs::copy(&entry, model.join(entry.file_name().unwrap())).unwrap();
        }
    }
}

/// Changes a JSON file of the folder `model`.
fn change(f: &Folder, file: &str, change: impl FnOnce(&mut Value)) {
    let path = f.path("model").join(file);
    let mut value: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

fn score(f: &Folder, data: &Path, more: &[&str]) -> Value {
    let (data, images) = (data.to_str().unwrap(), golden("images"));
    let args =
        ["score", "--model", "model", "--data", data, "--out", "scores.jsonl", "--images", images.to_str().unwrap()];
    f.ok(args.iter().chain(more));
    serde_json::from_str(fs::read_to_string(f.path("scores.jsonl")).unwrap().lines().next().unwrap()).unwrap()
}

/// The first sample of a file, token by token.
fn show(f: &Folder, data: &Path, more: &[&str]) -> Value {
    let args = ["data", "show", "--model", "model", "--json", "--data", data.to_str().unwrap()];
    serde_json::from_str(f.ok(args.iter().chain(more)).stdout.lines().next().unwrap()).unwrap()
}

/// The pieces that are trained on, joined.
fn trained(sample: &Value) -> String {
    let pairs = sample["pieces"].as_array().unwrap().iter().zip(sample["labels"].as_array().unwrap());
    pairs.filter(|(_, l)| !l.is_null()).map(|(p, _)| p.as_str().unwrap()).collect()
}

#[track_caller]
fn near(got: &Value, want: f64) {
    assert!((got.as_f64().unwrap() - want).abs() < 2e-5, "{got} is not {want}");
}

#[test]
fn a_named_end_token_is_one_token() {
    let (f, case) = (Folder::new(), case("04-eos-not-in-added-tokens"));
    model_with(&f, &case.join("tokenizer"));
    let line = score(&f, &case.join("data.json"), &[]);
    assert_eq!(line["label_tokens"], 10);
    near(&line["loss"], 6.918279);
    let sample = show(&f, &case.join("data.json"), &[]);
    assert_eq!(sample["labels"].as_array().unwrap().last().unwrap(), 2);
}

#[test]
fn an_image_token_keeps_what_it_strips() {
    let (f, case) = (Folder::new(), case("06-image-token-rstrip"));
    model_with(&f, &case.join("tokenizer"));
    near(&score(&f, &case.join("data.json"), &[])["loss"], 7.191842);
    // The other side: "USER: " and then the picture.
    let pieces = |f: &Folder| {
        show(f, &case.join("data.json"), &["--images", golden("images").to_str().unwrap()])["pieces"].clone()
    };
    let plain = pieces(&f);
    change(&f, "tokenizer.json", |t| {
        let tokens = t["added_tokens"].as_array_mut().unwrap();
        let image = tokens.iter_mut().find(|t| t["content"] == "<image>").unwrap();
        (image["lstrip"], image["rstrip"]) = (true.into(), false.into());
    });
    let at = |pieces: &Value| pieces.as_array().unwrap().iter().position(|p| p == "<image>").unwrap();
    let stripped = pieces(&f);
    assert_eq!((plain[at(&plain) - 1].as_str(), stripped[at(&stripped) - 1].as_str()), (Some("Ġ"), Some(":")));
}

#[test]
fn the_post_processor_says_whether_a_begin_token_comes_first() {
    let data = case("04-eos-not-in-added-tokens").join("data.json");
    for post in [true, false] {
        for said in [None, Some(true), Some(false)] {
            let f = Folder::new();
            f.model("model", |_| ());
            change(&f, "tokenizer.json", |t| {
                if !post {
                    t["post_processor"] = Value::Null;
                }
            });
            change(&f, "tokenizer_config.json", |c| {
                if let Some(said) = said {
                    c["add_bos_token"] = said.into();
                }
            });
            assert_eq!(show(&f, &data, &[])["ids"][0] == 1, post, "{post} {said:?}");
        }
    }
}

#[test]
fn a_class_that_transformers_builds_itself_is_named() {
    let data = case("04-eos-not-in-added-tokens").join("data.json");
    let f = Folder::new();
    f.model("model", |_| ());
    let show = ["data", "show", "--model", "model", "--data", data.to_str().unwrap()];
    assert!(!f.ok(show).stderr.contains("tokenizer_class"));
    change(&f, "tokenizer_config.json", |c| c["tokenizer_class"] = "Qwen2TokenizerFast".into());
    assert!(f.ok(show).stderr.contains("splits words otherwise than Qwen2Tokenizer"));
}

/// transformers renders a chat with add_special_tokens=False: an end token of the post-processor is not in it either.
#[test]
fn tokens_that_the_tokenizer_itself_puts_around_a_text() {
    let f = Folder::new();
    f.model("model", |_| ());
    let data =
        f.write("d.json", r#"[{"conversations":[{"from":"human","value":"Hi"},{"from":"gpt","value":"Yes."}]}]"#);
    let before = score(&f, &data, &[]);
    change(&f, "tokenizer.json", |v| {
        let post = &mut v["post_processor"];
        post["single"].as_array_mut().unwrap().push(json!({ "SpecialToken": { "id": "</s>", "type_id": 0 } }));
        post["special_tokens"]["</s>"] = json!({ "id": "</s>", "ids": [2], "tokens": ["</s>"] });
    });
    assert_eq!(score(&f, &data, &[]), before);
    let show = ["data", "show", "--model", "model", "--data", data.to_str().unwrap()];
    let told = f.ok(show).stderr;
    assert!(told.contains("its post_processor puts \"</s>\" behind a text, which is left out here"), "{told}");
    // More than one in front are not taken for one.
    change(&f, "tokenizer.json", |v| {
        let single = v["post_processor"]["single"].as_array_mut().unwrap();
        let end = single.pop().unwrap();
        single.insert(1, end);
    });
    let told = "model/tokenizer.json: its post_processor puts 2 tokens in front of a text (\"<s>\", \"</s>\")";
    f.fails(&show, &[told, "change the post_processor"]);
}

#[test]
fn an_opening_that_goes_further_than_an_answer_begins() {
    let (f, case) = (Folder::new(), case("13-generation-prompt-that-goes-further"));
    model_with(&f, &case);
    let line = score(&f, &case.join("data.json"), &["--template", "chat"]);
    assert_eq!(line["label_tokens"], 10);
    assert_eq!(trained(&show(&f, &case.join("data.json"), &["--template", "chat"])), "ĠRedĠandĠblue.</s>");
    let said = f.ok([
        "data",
        "show",
        "--model",
        "model",
        "--template",
        "chat",
        "--data",
        case.join("data.json").to_str().unwrap(),
    ]);
    assert!(said.stderr.contains("<think>") && said.stderr.contains("not how `generate` asks"), "{}", said.stderr);
}

#[test]
fn one_answer_is_dropped_in_front_and_not_two() {
    let (f, case) = (Folder::new(), case("16-two-answers-before-the-first-question"));
    f.model("model", |_| ());
    let data = case.join("data.json");
    let args = ["score", "--model", "model", "--data", data.to_str().unwrap(), "--out", "o"];
    f.fails(&args, &["turn 1 is out of order: gpt after gpt"]);
}

const U: Role = Role::User;
const A: Role = Role::Assistant;

fn talk(turns: &[(Role, &str)], pictures: usize) -> Conversation {
    let turns = turns.iter().map(|&(role, text)| Turn { role, text: text.into() }).collect();
    let picture = || Picture::new("a.png".into(), &adfreeze::spec::Data::new("d.json".into()));
    let images = (0..pictures).map(|_| picture()).collect();
    Conversation { id: "s".into(), images, turns, category: None, absent: vec![] }
}

fn chat(template: &str) -> Result<ChatTemplate> {
    let named = [("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"), ("image_token", "<image>")];
    ChatTemplate::new(Source {
        template: template.into(),
        names: named.map(|(k, v)| (k.into(), v.into())).into(),
        special: [
            "<s>",
            "</s>",
            "<image>",
            "<|im_start|>",
            "<|im_end|>",
            "<|user|>",
            "<|assistant|>",
            "<|end|>",
            "<think>",
        ]
        .map(String::from)
        .to_vec(),
        image: "<image>".into(),
        date: "2024-07-26".parse().unwrap(),
    })
}

/// What a template writes in front of a question.
fn written(template: &str) -> String {
    let text = chat(&format!("{template}|{{{{ messages[-1].content }}}}")).unwrap();
    let text = text.prompt(&talk(&[(U, "q")], 0).turns).unwrap();
    text.strip_suffix("|q").unwrap().to_string()
}

fn spans(r: &Rendered) -> Vec<&str> {
    r.trained.iter().map(|s| &r.text[s.clone()]).collect()
}

#[track_caller]
fn trains(template: &str, turns: &[(Role, &str)], want: &[&str]) {
    let rendered = chat(template).unwrap().conversation(&talk(turns, 0)).unwrap();
    assert_eq!(spans(&rendered), want, "{}", rendered.text);
}

#[test]
fn a_template_sees_what_transformers_gives_it() {
    assert_eq!(written("{{ tools is none }}{{ documents is none }}{{ tools is defined }}"), "TrueTrueTrue");
    assert_eq!(written("{{ bos_token }}{{ unk_token }}{{ image_token }}{{ pad_token }}"), "<s><unk><image>");
    assert_eq!(
        written("{{ pad_token is defined }}{{ enable_thinking is defined }}{{ debug is defined }}"),
        "FalseFalseFalse"
    );
    assert_eq!(
        written("{{ strftime_now('%d %b %Y') }} {{ strftime_now('%-d %B %y, %A') }}"),
        "26 Jul 2024 26 July 24, Friday"
    );
    assert_eq!(written("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"), "01");
    assert_eq!(
        written("{{ 'a</think>b'.split('</think>')[-1] }}{{ 'xay'.removeprefix('x').rsplit('a', 1) }}"),
        "b['', 'y']"
    );
    assert_eq!(written("{{ 'a.b.c'.rpartition('.')[2] }}{{ 'k=v'.partition('=')[0] }}{{ '7'.zfill(3) }}"), "ck007");
    let e = chat("{{ raise_exception('roles must alternate') }}").unwrap_err();
    assert!(e.cause().contains("roles must alternate"), "{e}");
}

/// Values of Python 3.12's `json.dumps(…, ensure_ascii=False)`.
#[test]
fn tojson_is_that_of_python() {
    assert_eq!(written("{{ \"a < b & 'c' é\" | tojson }}"), "\"a < b & 'c' é\"");
    assert_eq!(
        written(r#"{{ {"b": [1, 2.5, none, true], "a": {}} | tojson }}"#),
        r#"{"b": [1, 2.5, null, true], "a": {}}"#
    );
    assert_eq!(
        written(r#"{{ {"b": 1, "a": "é"} | tojson(ensure_ascii=true, sort_keys=true) }}"#),
        r#"{"a": "\u00e9", "b": 1}"#
    );
    assert_eq!(written("{{ [1, [2]] | tojson(indent=2) }}"), "[\n  1,\n  [\n    2\n  ]\n]");
    assert_eq!(written("{{ [1, {'k': 2}] | tojson(separators=(',', ':')) }}"), r#"[1,{"k":2}]"#);
    assert_eq!(written(r#"{{ "\n\t\"\\" | tojson }}"#), r#""\n\t\"\\""#);
}

#[test]
fn generation_marks_are_the_mask() {
    let template = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ '<|assistant|>' + m.content + '</s>' }}\
        {% endgeneration %}{% else %}{{ '<|user|>' + m.content }}{% endif %}{% endfor %}\
        {% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}";
    trains(template, &[(U, "q"), (A, "a"), (U, "r"), (A, " b ")], &["<|assistant|>a</s>", "<|assistant|> b </s>"]);
    let none = "{% for m in messages %}{{ m.content }}{% endfor %}{% if false %}{% generation %}{% endgeneration %}{% endif %}";
    let e = chat(none).unwrap().conversation(&talk(&[(U, "q"), (A, "a")], 0)).unwrap_err();
    assert!(e.cause().contains("generation"), "{e}");
}

/// As Qwen3: reasoning is taken out of earlier answers, and an empty one is put into the last.
const QWEN3: &str = "{%- for m in messages %}{%- if m.role == 'assistant' %}{%- set c = m.content %}{%- set r = '' %}\
    {%- if '</think>' in c %}{%- set r = c.split('</think>')[0].split('<think>')[-1].strip('\\n') %}\
    {%- set c = c.split('</think>')[-1].lstrip('\\n') %}{%- endif %}{{- '<|im_start|>assistant\\n' }}\
    {%- if loop.last %}{{- '<think>\\n' + r + '\\n</think>\\n\\n' }}{%- endif %}{{- c + '<|im_end|>\\n' }}\
    {%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}\
    {%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}";

/// As Phi-3: another end token after the last turn.
const PHI3: &str = "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}";

/// As DeepSeek-R1's distilled models: the generation prompt opens a reasoning that answers do not have.
const R1: &str = "{% for m in messages %}{% if m.role == 'assistant' %}{% set c = m.content %}{% if '</think>' in c %}\
    {% set c = c.split('</think>')[-1] %}{% endif %}{{ '<|assistant|>' + c + '</s>' }}{% else %}{{ '<|user|>' + m.content }}{% endif %}\
    {% endfor %}{% if add_generation_prompt %}{{ '<|assistant|><think>\\n' }}{% endif %}";

#[test]
fn templates_that_write_the_past_otherwise() {
    let thought = "<think>\nHm.\n</think>\n\n";
    let (ada, then) = (format!("{thought}Ada."), format!("{thought}Then."));
    let thinking = [(U, "Who?"), (A, ada.as_str()), (U, "When?"), (A, then.as_str())];
    trains(QWEN3, &thinking, &["Ada.<|im_end|>", "<think>\nHm.\n</think>\n\nThen.<|im_end|>"]);
    let talk = [(U, "Who? \n"), (A, " Ada. \n"), (U, "When?\n"), (A, "\nThen.")];
    trains(QWEN3, &talk, &[" Ada. \n<|im_end|>", "<think>\n\n</think>\n\n\nThen.<|im_end|>"]);
    trains(PHI3, &talk, &[" Ada. \n<|end|>", "\nThen.<|end|>"]);
    trains(R1, &talk, &[" Ada. \n</s>", "\nThen.</s>"]);
    trains(R1, &thinking, &["\n\nAda.</s>", "\n\nThen.</s>"]);
    // What an answer and the generation prompt begin with in common belongs to the answer.
    trains(R1, &[(U, "q"), (A, "<b>bold</b>")], &["<b>bold</b></s>"]);
    // Texts that are trimmed, a number in a turn's place, an answer that ends in the middle of the talk.
    let trimmed = PHI3.replace("m.content +", "m.content | trim +");
    trains(&trimmed, &talk, &["Ada.<|end|>", "Then.<|end|>"]);
    trains(&PHI3.replace("+ m.content", "+ (m.content | tojson)"), &[(U, "q"), (A, "a")], &["\"a\"<|end|>"]);
    let quoted = PHI3.replace("+ m.content", "+ (m.content | tojson)");
    trains(&quoted, &[(U, "q"), (A, " a \n"), (U, "r"), (A, "b")], &["\" a \\n\"<|end|>", "\"b\"<|end|>"]);
    trains(PHI3, &[(U, "q"), (A, "a"), (U, "r")], &["a<|end|>"]);
    // As Mistral: the system's text is left out where an answer follows.
    let mistral = "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + (messages[0].content + ' ' if loop.last else '') + m.content + '[/INST]' }}\
        {% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}";
    trains(mistral, &[(Role::System, "Brief."), (U, "q"), (A, "a")], &[" a</s>"]);
    // Whoever ends no answer is left with the answer alone.
    let endless = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}";
    trains(endless, &[(U, "q"), (A, "a"), (U, "r"), (A, "b")], &["a", "b"]);
    assert_eq!((chat(endless).unwrap().end_token(), chat(PHI3).unwrap().end_token()), (None, Some("<|end|>")));
    assert_eq!((chat(R1).unwrap().warnings().len(), chat(QWEN3).unwrap().warnings().len()), (1, 0));
}

#[test]
fn a_true_cause_where_no_span_can_be_told() {
    let shouting = "{% for m in messages %}{{ m.role + ':' + (m.content | reverse) }}{% endfor %}{% if add_generation_prompt %}{{ 'so:' }}{% endif %}";
    let shouting =
        shouting.replace("(m.content | reverse)", "(m.content[::-1] if m.role == 'assistant' else m.content)");
    let e = chat(&shouting).unwrap().conversation(&talk(&[(U, "q"), (A, "abc")], 0)).unwrap_err();
    assert!(e.cause().contains("opens an answer with") && e.hint_text().unwrap().contains("generation"), "{e}");
}

#[test]
fn pictures_are_parts_where_a_template_takes_them() {
    let both = "{% for m in messages %}{{ '[' + m.role + ']' }}{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}\
        {% if c.type == 'image' %}{{ '(<image>)' }}{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}{{ '</s>' }}{% endfor %}\
        {% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}";
    let text = |template: &str, question: &str, pictures| {
        chat(template).unwrap().conversation(&talk(&[(U, question), (A, "a")], pictures)).unwrap().text
    };
    assert_eq!(text(both, "<image>\nq", 1), "[user](<image>)q</s>[assistant]a</s>");
    assert_eq!(text(both, "q", 0), "[user]q</s>[assistant]a</s>");
    // One that writes another token for pictures than the model's is given text.
    assert_eq!(text(&both.replace("(<image>)", "<img>"), "<image>\nq", 1), "[user]<image>\nq</s>[assistant]a</s>");
    // A list that is written as it is was not understood.
    let naive = "{% for m in messages %}{{ m.role ~ m.content }}{% endfor %}";
    assert_eq!(text(naive, "<image>\nq", 1), "user<image>\nqassistanta");
}

const RECIPE: &str = r#"
stages     = ["sft"]
output_dir = "run"
[model]
source   = "model"
template = "chat"
[stage.sft]
train     = ["projector.*"]
data      = [{ path = "data.json" }]
batch     = { global = 1 }
lr        = 1e-3
max_steps = 2
"#;

fn with_template(template: &str) -> Folder {
    let f = Folder::with(RECIPE);
    f.model("model", |_| ());
    f.write("model/chat_template.jinja", template);
    let image = golden("images/exact0.png");
    f.write(
        "data.json",
        &json!([{"id": "s", "image": image, "conversations": [
        {"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "Ada."}]}])
        .to_string(),
    );
    f
}

#[test]
fn a_template_that_writes_no_end_token_is_named() {
    let template = "{% for m in messages %}{{ '<s>' + m.content }}{% endfor %}{% if add_generation_prompt %}{{ '<s>' }}{% endif %}";
    for command in [&["check", "recipe.toml"][..], &["train", "recipe.toml"]] {
        let said = with_template(template).ok(command);
        assert!(said.stderr.contains("not taught to stop"), "{}", said.stderr);
    }
    let other = with_template(&template.replace("m.content", "m.content + '<pad>'"));
    let said = other.ok(["check", "recipe.toml"]);
    assert!(said.stderr.contains("ends answers with <pad>, but generation stops at </s>"), "{}", said.stderr);
}

#[test]
fn the_date_is_kept_with_the_run() {
    let template = "{{ strftime_now('%Y-%m-%d') }}{% for m in messages %}{{ '<s>' + m.content + '</s>' }}{% endfor %}\
        {% if add_generation_prompt %}{{ '<s>' }}{% endif %}";
    let f = with_template(template);
    let shown = f.ok(["data", "show", "recipe.toml", "--set", "model.template_date='1999-12-31'", "--json"]).stdout;
    let shown: Value = serde_json::from_str(&shown).unwrap();
    let text: String = shown["pieces"].as_array().unwrap().iter().map(|p| p.as_str().unwrap()).collect();
    assert!(text.starts_with("<s>1999-12-31"), "{text}");
    f.train(&["--set", "model.template_date='1999-12-31'", "--set", "stage.sft.max_steps=1", "--set", CONSTANT]);
    // Another day: the run goes on with its own.
    let said = f.train(&["--set", "stage.sft.max_steps=1", "--set", CONSTANT]);
    assert!(said.stderr.contains("nothing to do"), "{}", said.stderr);
    assert!(fs::read_to_string(f.path("run/recipe.toml")).unwrap().contains("template_date = \"1999-12-31\""));
    f.fails(&["check", "recipe.toml", "--set", "model.template_date='tomorrow'"], &["template_date", "2024-07-26"]);
    // Without the date in the template, none is kept.
    let f = with_template(&template.replace("{{ strftime_now('%Y-%m-%d') }}", ""));
    f.train(&[]);
    assert!(!fs::read_to_string(f.path("run/recipe.toml")).unwrap().contains("template_date"));
}

#[test]
fn samples_are_shown_token_by_token() {
    let f = Folder::with(super::folder::THREE_STAGES);
    let said = f.ok(["data", "show", "recipe.toml", "--stage", "dpo"]).stdout;
    assert!(said.contains("chosen answer: ") && said.contains("rejected answer: "), "{said}");
    assert!(said.contains("<image> × 16"), "{said}");
    assert!(said.lines().all(|l| l.chars().count() <= 80), "{said}");
    let lines = f.ok(["data", "show", "recipe.toml", "--json", "--n", "3"]).stdout;
    let samples: Vec<Value> = lines.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(samples.len(), 3);
    assert!(trained(&samples[0]).ends_with('Ċ'));
    let id = samples[2]["id"].as_str().unwrap();
    let one = f.ok(["data", "show", "recipe.toml", "--json", "--id", id]).stdout;
    assert_eq!(one.lines().next(), lines.lines().nth(2));
    f.fails(
        &["data", "show", "recipe.toml", "--id", "nobody"],
        &["no sample nobody", samples[0]["id"].as_str().unwrap()],
    );
    f.fails(&["data", "show", "recipe.toml", "--stage", "nobody"], &["no stage `nobody`", "`align`, `sft`, `dpo`"]);
    f.fails(&["data", "show", "--data", "d.json"], &["--model"]);
}

#[test]
fn text_that_the_tokenizer_cannot_write_is_counted() {
    let f = Folder::new();
    f.model("model", |_| ());
    let vocab = json!({"<unk>": 0, "<s>": 1, "</s>": 2, "red": 3, "USER:": 4, "ASSISTANT:": 5, "Mine": 6});
    change(&f, "tokenizer.json", |t| {
        t["model"] = json!({"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"});
        t["pre_tokenizer"] = json!({"type": "WhitespaceSplit"});
        t["decoder"] = Value::Null;
    });
    change(&f, "config.json", |c| c["image_token_index"] = 7.into());
    change(&f, "tokenizer.json", |t| {
        let tokens = t["added_tokens"].as_array_mut().unwrap();
        tokens.retain(|t| t["content"] != "<pad>");
        tokens.iter_mut().for_each(|t| {
            if t["content"] == "<image>" {
                t["id"] = 7.into();
            }
        });
    });
    let talk = |answer: &str| json!({"conversations": [{"from": "system", "value": "Mine"}, {"from": "human", "value": "red red"}, {"from": "gpt", "value": answer}]});
    f.write("d.json", &json!([talk("red rouge rosso"), talk("red")]).to_string());
    let said = f.ok(["data", "show", "--model", "model", "--data", "d.json"]);
    assert!(said.stderr.contains("2 of 8 words in 1 sample(s): they become <unk>"), "{}", said.stderr);
    f.write("d.json", &json!([talk("red")]).to_string());
    assert!(!f.ok(["data", "show", "--model", "model", "--data", "d.json"]).stderr.contains("cannot write"));
}
