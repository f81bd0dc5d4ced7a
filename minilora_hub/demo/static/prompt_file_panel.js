// The table of answers to a file of prompts: rows are only appended, and every cell is text.
const box = element.querySelector(".ml-batch");
const find = (name) => box.querySelector(name);
let head = "";
let rows = 0;

function cell(tag, text, name) {
  const one = document.createElement(tag);
  one.textContent = text;
  if (name) one.className = name;
  return one;
}

function row(number, about, names) {
  const line = document.createElement("tr");
  const first = cell("th", about.prompt);
  first.scope = "row";
  line.append(cell("td", String(number), "ml-batch-number"), first);
  if (about.error) {
    const wide = cell("td", about.error, "ml-batch-error");
    wide.colSpan = names.length;
    line.append(wide);
  } else {
    for (const one of about.answers) {
      const mark = one.passed === true ? "✓ " : one.passed === false ? "✗ " : "";
      line.append(cell("td", one.error || mark + one.text, one.error || one.passed === false ? "ml-batch-error" : ""));
    }
  }
  return line;
}

// "name: 12 of 20 right, 39% to 78%", below the name of a column whose answers were checked.
function rateWords(rate) {
  const whole = (share) => `${Math.round(100 * share)} %`;
  return rate ? `${rate.passed} of ${rate.n} right (95%: ${whole(rate.low)} to ${whole(rate.high)})` : "";
}

function csvRow(cells) {
  return cells.map((text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text)).join(",") + "\r\n";
}

// A row for each prompt: the prompt, the answer of each column, and the errors.
function csvTable({ names, rates, rows }) {
  const checked = rates.some((rate) => rate);
  const lines = rows.map(({ prompt, answers, error }) => {
    const errors = error ? [error] : answers.filter((one) => one.error).map((one) => one.error);
    const texts = error ? names.map(() => "") : answers.map((one) => one.text);
    const passed = error ? names.map(() => "") : answers.map((one) => String(one.passed ?? ""));
    return csvRow([prompt, ...texts, ...(checked ? passed : []), errors.join("; ")]);
  });
  return csvRow(["prompt", ...names, ...(checked ? names.map((name) => `${name} right`) : []), "errors"]) + lines.join("");
}

function save(kind) {
  const { names, rates, sampling, rows } = props.value;
  const text = kind === "csv" ? csvTable(props.value) : JSON.stringify({ columns: names, rates, sampling, rows }, null, 2) + "\n";
  window.minilora.save(`minilora-batch.${kind}`, new Blob([text], { type: kind === "csv" ? "text/csv" : "application/json" }));
}

function paint() {
  const now = props.value;
  if (!now || !now.phase) return;
  box.dataset.phase = now.phase;
  find(".ml-batch-words").textContent = now.words;
  find(".ml-batch-bar").value = now.total ? now.rows.length / now.total : 0;
  find(".ml-batch-stop").hidden = now.phase !== "busy";
  for (const one of box.querySelectorAll("[data-kind]")) one.hidden = !(now.phase === "done" && now.rows.length);
  find(".ml-batch-scroll").hidden = now.rows.length === 0;
  const names = JSON.stringify(now.names);
  if (names !== head || now.rows.length < rows) {
    const line = document.createElement("tr");
    for (const name of ["", "prompt", ...now.names]) line.append(cell("th", name));
    for (const one of line.children) one.scope = "col";
    find("thead").replaceChildren(line);
    find("tbody").replaceChildren();
    rows = 0;
    head = names;
  }
  now.names.forEach((name, index) => (find("thead tr").children[index + 2].textContent = [name, rateWords(now.rates[index])].filter(Boolean).join("\n")));
  for (; rows < now.rows.length; rows += 1) find("tbody").append(row(rows + 1, now.rows[rows], now.names));
}

box.addEventListener("click", (event) => {
  const kind = event.target.closest("[data-kind]")?.dataset.kind;
  if (kind) save(kind);
});
find(".ml-batch-stop").addEventListener("click", () => trigger("submit"));
watch("value", paint);
paint();
