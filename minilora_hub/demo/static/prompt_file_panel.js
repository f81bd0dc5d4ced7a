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
    for (const one of about.answers) line.append(cell("td", one.error || one.text, one.error ? "ml-batch-error" : ""));
  }
  return line;
}

function csvRow(cells) {
  return cells.map((text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text)).join(",") + "\r\n";
}

// A row for each prompt: the prompt, the answer of each column, and the errors.
function csvTable({ names, rows }) {
  const lines = rows.map(({ prompt, answers, error }) => {
    const errors = error ? [error] : answers.filter((one) => one.error).map((one) => one.error);
    const texts = error ? names.map(() => "") : answers.map((one) => one.text);
    return csvRow([prompt, ...texts, errors.join("; ")]);
  });
  return csvRow(["prompt", ...names, "errors"]) + lines.join("");
}

function save(kind) {
  const { names, sampling, rows } = props.value;
  const text = kind === "csv" ? csvTable(props.value) : JSON.stringify({ columns: names, sampling, rows }, null, 2) + "\n";
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
  for (; rows < now.rows.length; rows += 1) find("tbody").append(row(rows + 1, now.rows[rows], now.names));
}

box.addEventListener("click", (event) => {
  const kind = event.target.closest("[data-kind]")?.dataset.kind;
  if (kind) save(kind);
});
find(".ml-batch-stop").addEventListener("click", () => trigger("submit"));
watch("value", paint);
paint();
