// Blind mode: the switch, the votes, and their keys. The server sends the names only after the vote.
const box = element.querySelector(".ml-blind");
const toggle = box.querySelector(".ml-switch");
const votes = box.querySelector(".ml-votes");
const OTHERS = [
  { choice: "tie", label: "Tie", key: "t" },
  { choice: "all bad", label: "All bad", key: "x" },
];
let letters = null;

function button(label, key, data, name) {
  const one = document.createElement("button");
  one.type = "button";
  one.className = "ml-vote";
  one.textContent = label;
  one.setAttribute("aria-label", name);
  one.setAttribute("aria-keyshortcuts", key);
  one.dataset.key = key;
  one.addEventListener("click", () => {
    for (const other of votes.children) other.disabled = true;
    trigger("select", data);
  });
  return one;
}

function offer(now) {
  const vote = (choice) => ({ action: "vote", choice });
  const choices = [...now].map((letter, index) => {
    const one = button(letter, String(index + 1), vote(String(index)), `Answer ${letter} is best`);
    one.classList.add("ml-letter");
    return one;
  });
  for (const { choice, label, key } of OTHERS) choices.push(button(label, key, vote(choice), label));
  const reveal = button("Show names", "", { action: "reveal" }, "Show the names without a vote");
  reveal.classList.add("ml-quiet");
  votes.replaceChildren(...choices, reveal);
}

function paint() {
  const now = props.value;
  if (!now || !now.phase) return;
  box.dataset.phase = now.phase;
  toggle.setAttribute("aria-checked", String(now.phase !== "off"));
  box.querySelector(".ml-blind-words").textContent = now.words;
  const command = box.querySelector(".ml-train");
  command.textContent = now.command || "";
  command.hidden = !now.command;
  const focused = votes.contains(document.activeElement);
  votes.hidden = now.phase !== "open";
  if (now.phase === "open") offer(now.letters);
  if (focused && votes.hidden) toggle.focus();
}

function press(key) {
  if (!votes.hidden) [...votes.children].find((one) => one.dataset.key === key && !one.disabled)?.click();
}

function flip() {
  trigger("select", { action: "switch", blind: box.dataset.phase === "off" });
}

document.addEventListener("keydown", (event) => {
  const typing = event.target.closest?.("input, textarea, select, [contenteditable]");
  if (typing || event.ctrlKey || event.metaKey || event.altKey || event.isComposing || event.repeat) return;
  const key = event.key.toLowerCase();
  if (key === "b") flip();
  else if (key === "t" || key === "x") press(key);
});
document.addEventListener("ml:vote", (event) => press(String(event.detail)));  // the keys 1 to 9, see comparison.js
toggle.addEventListener("click", flip);
watch("value", paint);
paint();
