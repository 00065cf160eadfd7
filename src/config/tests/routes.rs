//! Routes.

use super::*;

#[test]
fn quoted_sql_variable_is_refused() {
    let with_query = |query: &str| {
        let route = format!("[{{sql: {{url: 'sqlite:users.db', query: \"{query}\"}}}}]");
        parse(Path::new("v.yaml"), &edited("[{default: a}]", &route))
    };
    let report = with_query("SELECT b FROM u WHERE n = '%{user}'").unwrap_err().to_string();
    assert!(report.contains("sql.query: %{user} is within quotes"), "{report}");
    assert!(report.contains("WHERE name = %{user}"), "{report}");
    assert!(with_query("SELECT b FROM u WHERE n = %{user} AND t = 'mail'").is_ok());
}
