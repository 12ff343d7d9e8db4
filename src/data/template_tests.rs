use super::*;

fn marks() -> Marks {
    Marks { eos: "</s>".into(), image: "<image>".into() }
}

fn talk(turns: &[(Role, &str)]) -> Conversation {
    let turns = turns.iter().map(|&(role, text)| Turn { role, text: text.into() }).collect();
    Conversation { id: "s".into(), images: vec![], turns, category: None, absent: vec![] }
}

fn spans(r: &Rendered) -> Vec<&str> {
    r.trained.iter().map(|s| &r.text[s.clone()]).collect()
}

use Role::{Assistant as A, System as S, User as U};

#[test]
fn vicuna_puts_pictures_first_and_trains_on_answers() {
    let c = talk(&[(U, "Look at <image> and <image> now."), (A, "yes"), (U, "so?"), (A, "so")]);
    let r = vicuna_v1(&c, "SYS", &marks());
    assert_eq!(r.text, "SYS USER: <image>\n<image>\nLook at  and  now. ASSISTANT: yes</s>USER: so? ASSISTANT: so</s>");
    assert_eq!(spans(&r), [" yes</s>", " so</s>"]);
    let own = vicuna_v1(&talk(&[(S, "Mine."), (U, "q"), (A, "a")]), "SYS", &marks());
    assert_eq!(own.text, "Mine. USER: q ASSISTANT: a</s>");
}

#[test]
fn plain_wants_one_turn_each() {
    let e = plain(&talk(&[(U, "q"), (A, "a"), (U, "q"), (A, "a")]), &marks()).unwrap_err();
    assert!(e.cause().contains("plain") && e.cause().contains('4'), "{e}");
}

const CHATML: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
    {{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}\
    {{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

fn chat(source: &str) -> Result<ChatTemplate> {
    let names = [("bos_token", "<s>"), ("eos_token", "</s>")].map(|(k, v)| (k.to_string(), v.to_string()));
    ChatTemplate::new(Source {
        template: source.into(),
        names: names.into(),
        special: ["<|im_start|>", "<|im_end|>", "</s>"].map(String::from).to_vec(),
        image: "<image>".into(),
        date: jiff::civil::date(2024, 7, 26),
    })
}

#[test]
fn a_chat_template_trains_answers_through_their_end_token() {
    let c = talk(&[(U, "q"), (A, "a"), (U, "r"), (A, "<|im_start|> b ")]);
    let r = chat(CHATML).unwrap().conversation(&c).unwrap();
    assert!(r.text.starts_with("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nq"));
    assert_eq!(spans(&r), ["a<|im_end|>", "<|im_start|> b <|im_end|>"]);
}

#[test]
fn white_space_around_turns_that_a_template_writes_as_json() {
    let t = chat(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content | tojson }}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
    )
    .unwrap();
    let turns = [(U, " a \n"), (A, " b \n"), (U, "c"), (A, "\nd\t")];
    let r = t.conversation(&talk(&turns)).unwrap();
    assert_eq!(spans(&r), ["\" b \\n\"</s>", "\"\\nd\\t\"</s>"]);
}

#[test]
fn a_chat_template_may_want_parts() {
    let source = "{% for m in messages %}{{ m.role.upper() + ': ' }}\
        {% for c in m.content | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}\
        {% for c in m.content | selectattr('type', 'equalto', 'text') %}{% if m.role == 'user' %}{{ c.text + ' ' }}{% else %}\
        {% generation %}{{ c.text + ' ' }}{% endgeneration %}{% endif %}{% endfor %}{% endfor %}{%- if add_generation_prompt %}ASSISTANT: {% endif %}";
    let r = chat(source).unwrap().conversation(&talk(&[(U, "What\n<image>"), (A, "It.")])).unwrap();
    assert_eq!(r.text, "USER: <image>\nWhat ASSISTANT: It. ");
    assert_eq!(spans(&r), ["It. "]);
}

#[test]
fn a_chat_template_that_rewrites_the_past_is_an_error() {
    let source = "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}";
    let e = chat(source).unwrap().conversation(&talk(&[(U, "q"), (A, "a"), (U, "r"), (A, "b")])).unwrap_err();
    assert!(e.cause().contains("turn 1"), "{e}");
}

#[test]
fn a_broken_chat_template_is_an_error() {
    assert!(chat("{% for %}").unwrap_err().cause().contains("line 1"));
    assert!(chat("{%} set x %}").unwrap_err().cause().contains("line 1"));
    assert!(chat("nothing").unwrap_err().cause().contains("does not show"));
    let e = chat("{{ raise_exception('roles must alternate') }}").unwrap_err();
    assert!(e.cause().contains("roles must alternate"), "{e}");
}

#[test]
fn formats_and_dates_as_python_writes_them() {
    let written = |template: &str| {
        let template = format!("{template}{{{{ messages[-1].content }}}}");
        chat(&template).and_then(|t| t.prompt(&[Turn { role: U, text: "q".into() }]))
    };
    assert_eq!(written("{{ '{:>5}|70000'.format('a') }}").unwrap(), "    a|70000q");
    for wide in ["{:>3000000000}", "{:.3000000000f}", "{:>99999999999999999999999}"] {
        let e = written(&format!("{{{{ '{wide}'.format(1.5) }}}}")).unwrap_err();
        assert!(e.cause().contains("a width of more than 65536 characters"), "{e}");
    }
    // As of a datetime without a zone.
    assert_eq!(written("{{ strftime_now('%H%%Z%Z|%z%%') }}").unwrap(), "00%Z|%q");
}

#[test]
fn a_comment_marks_nothing() {
    let template = chat(&format!("{{# Not {{% generation %}} but {{% endgeneration %}} #}}{CHATML}")).unwrap();
    let r = template.conversation(&talk(&[(U, "q"), (A, "yes")])).unwrap();
    assert_eq!(spans(&r), ["yes<|im_end|>"]);
}
