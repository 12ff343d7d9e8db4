//! Input that is made to hurt: memory and time stay bounded, and what is wrong is told.

/// Chat templates and tokenizers.
mod templates {
    use super::super::folder::Folder;
    use serde_json::{Value, json};
    use std::fs;
    use std::time::{Duration, Instant};

    /// The golden model with another chat template, and samples of `turns` turns.
    fn with(template: &str, turns: usize) -> Folder {
        let f = Folder::new();
        f.model("model", |_| ());
        f.write("model/chat_template.jinja", template);
        let turn = |i: usize| json!({"from": ["human", "gpt"][i % 2], "value": "a".repeat(50)});
        let talk: Vec<Value> = (0..turns).map(turn).collect();
        f.write("d.json", &json!([{"conversations": talk}, {"conversations": talk}]).to_string());
        f
    }

    fn tokenizer(change: impl FnOnce(&mut Value)) -> Folder {
        let f = with("", 2);
        let path = f.path("model/tokenizer.json");
        let mut value: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        change(&mut value);
        fs::write(path, value.to_string()).unwrap();
        f
    }

    /// The command must end with this error, in bounded time.
    #[track_caller]
    fn refused(f: &Folder, template: &str, parts: &[&str]) {
        let begin = Instant::now();
        let args = ["score", "--model", "model", "--data", "d.json", "--out", "o", "--template", template];
        let said = f.fails(&args, parts);
        assert!(begin.elapsed() < Duration::from_secs(20), "{:?}: {said}", begin.elapsed());
    }

    const ENDLESS: &str = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}{{ messages[0].content }}";

    #[test]
    fn chat_templates_come_to_an_end() {
        refused(&with(ENDLESS, 2), "chat", &["does not come to an end"]);
        let doubling = "{% set ns = namespace(s='x') %}{% for a in range(40) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ messages[0].content }}";
        refused(&with(doubling, 2), "chat", &["writes without bound"]);
        let itself = "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}{{ messages[0].content }}";
        refused(&with(itself, 2), "chat", &["recursion limit"]);
        let long = "{{ 'x' * 9000000 }}{{ messages[0].content }}";
        refused(&with(long, 2), "chat", &["the chat template makes 9000"]);
        let nested = format!("{}{}", "{% if true %}".repeat(100_000), "{% endif %}".repeat(100_000));
        refused(&with(&nested, 2), "chat", &["recursion limits"]);
    }

    #[test]
    fn a_chat_template_that_is_not_used_does_no_harm() {
        with(ENDLESS, 2).ok(["score", "--model", "model", "--data", "d.json", "--out", "o"]);
    }

    #[test]
    fn many_turns_take_linear_time() {
        let chatml = "{% for m in messages %}{{ '<s>' + m.role + m.content + '</s>' }}{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant' }}{% endif %}";
        // They do not fit; rendering and encoding them is what takes time.
        refused(&with(chatml, 20_000), "chat", &["max_seq_len"]);
    }

    #[test]
    fn patterns_that_backtrack_without_end_are_an_error() {
        let split =
            |r: &str| json!({"type": "Split", "pattern": {"Regex": r}, "behavior": "Isolated", "invert": false});
        refused(&tokenizer(|t| t["pre_tokenizer"] = split("(a+)+b")), "vicuna_v1", &["tries too many ways"]);
        let replace = json!({"type": "Replace", "pattern": {"Regex": "(a|aa)+$b"}, "content": ""});
        refused(&tokenizer(|t| t["normalizer"] = replace), "vicuna_v1", &["tries too many ways"]);
    }

    #[test]
    fn normalizers_that_make_a_text_grow_are_an_error() {
        let prepend = json!({"type": "Prepend", "prepend": "a".repeat(1 << 20)});
        refused(&tokenizer(|t| t["normalizer"] = prepend), "vicuna_v1", &["tokenizer.json", "in front of every text"]);
        let replace = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "a".repeat(1000)});
        let all = json!({"type": "Sequence", "normalizers": vec![replace; 4]});
        refused(
            &tokenizer(|t| t["normalizer"] = all),
            "vicuna_v1",
            &["tokenizer.json", "normalizer can make a text 1000000000000 times as long"],
        );
    }

    #[test]
    fn a_text_that_cannot_fit_is_not_encoded() {
        let f = with("", 2);
        let long = json!([{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "ab ".repeat(3 << 20)}]}]);
        f.write("d.json", &long.to_string());
        refused(&f, "vicuna_v1", &["bytes of text", "max_seq_len"]);
    }
}
