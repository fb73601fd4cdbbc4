//! The tables as a page of the docs.

use std::fmt::Write;

use super::{
    CHAT_COMPLETIONS, COMPLETIONS, COUNT_TOKENS, EMBEDDINGS, FieldTable, GENERATE, GENERATE_PARAMETERS, MESSAGES,
    RESPONSES, Treatment,
};

/// All tables, in the order of the page.
pub(super) const TABLES: &[&FieldTable] = &[
    &COMPLETIONS,
    &CHAT_COMPLETIONS,
    &RESPONSES,
    &EMBEDDINGS,
    &MESSAGES,
    &COUNT_TOKENS,
    &GENERATE,
    &GENERATE_PARAMETERS,
];

/// The page `docs/fields.md`, in Markdown: every table with every field. A test keeps the file equal to it.
pub fn fields_page() -> String {
    let mut out = "# Fields of requests\n\nGenerated from `src/server/field_table`: each field of a request body is honoured, has no \
                   effect (and why), or is refused by\nname with status 400 (422 in TGI's API). A field that is not listed is refused as unknown. `null` \
                   counts as absent. A refused field is accepted with\n`false`, an empty value or the neutral value given here.\n"
        .to_owned();
    for table in TABLES {
        let _ = write!(out, "\n## {}\n\n| field | treatment | notes |\n|---|---|---|\n", table.routes);
        for field in table.fields() {
            let (treatment, notes) = match &field.treatment {
                Treatment::Honoured(meaning) => ("honoured", (*meaning).to_owned()),
                Treatment::NoEffect(why) => ("no effect", (*why).to_owned()),
                Treatment::Refused { neutral: None, instead } => ("refused", (*instead).to_owned()),
                Treatment::Refused { neutral: Some(neutral), instead } => {
                    ("refused", format!("{instead} (accepted: `{neutral}`)"))
                }
            };
            let _ = writeln!(out, "| `{}` | {treatment} | {} |", field.name, notes.replace('|', "\\|"));
        }
    }
    out
}
