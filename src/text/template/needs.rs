//! Finds what a template uses and does not exist here, before a request needs it.
//!
//! minijinja looks filters, tests, functions and methods up when it reaches them. Only its compiled instructions name them all,
//! which is why its unstable interface is used here and nowhere else.

use std::collections::BTreeSet;

use minijinja::machinery::{Instruction, Instructions, get_compiled_template};
use minijinja::value::{Serde, Value};
use minijinja::{Environment, ErrorKind, State};

use crate::{Error, Result};

/// Functions and methods of Jinja itself: loops, blocks and calls with a body.
const BUILT_IN: [&str; 6] = ["loop", "caller", "super", "self", "cycle", "changed"];

/// Checks that everything that the template `name` uses exists.
///
/// # Errors
/// `Invalid` with the names of what does not.
pub(super) fn check(environment: &Environment<'static>, name: &str) -> Result<()> {
    let template = environment.get_template(name).map_err(|e| Error::invalid(e.to_string()))?;
    // What the template does not define itself.
    let undeclared = template.undeclared_variables(false);
    let globals: BTreeSet<String> = environment.globals().map(|(name, _)| name.to_owned()).collect();
    let mut state = environment.empty_state();
    let compiled = get_compiled_template(&template);
    let mut missing = BTreeSet::new();
    for instruction in [&compiled.instructions].into_iter().chain(compiled.blocks.values()).flat_map(all) {
        match instruction {
            Instruction::ApplyFilter(name, ..) if lacks_filter(&mut state, name) => {
                missing.insert(format!("the filter `{name}`"));
            }
            Instruction::PerformTest(name, ..) if lacks_test(&mut state, name) => {
                missing.insert(format!("the test `{name}`"));
            }
            Instruction::CallFunction(name, _)
                if undeclared.contains(*name) && !globals.contains(*name) && !BUILT_IN.contains(name) =>
            {
                missing.insert(format!("the function `{name}`"));
            }
            Instruction::CallMethod(name, _) if lacks_method(&mut state, name) && !BUILT_IN.contains(name) => {
                missing.insert(format!("the method `{name}`"));
            }
            _ => {}
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    let missing = missing.into_iter().collect::<Vec<_>>().join(", ");
    Err(Error::invalid(format!("it needs {missing}, which this server does not have: change the template")))
}

fn all<'a, 'source>(instructions: &'a Instructions<'source>) -> impl Iterator<Item = &'a Instruction<'source>> {
    (0..).map_while(|index| instructions.get(index))
}

fn lacks_filter(state: &mut State, name: &str) -> bool {
    state.apply_filter(name, &[]).is_err_and(|e| e.kind() == ErrorKind::UnknownFilter)
}

fn lacks_test(state: &mut State, name: &str) -> bool {
    state.perform_test(name, &[]).is_err_and(|e| e.kind() == ErrorKind::UnknownTest)
}

/// Whether no kind of value has the method.
fn lacks_method(state: &mut State, name: &str) -> bool {
    let values = [Value::from(""), Value::from(Serde(&serde_json::json!({}))), Value::from(Vec::<Value>::new())];
    values.iter().all(|value| value.call_method(state, name, &[]).is_err_and(|e| e.kind() == ErrorKind::UnknownMethod))
}
