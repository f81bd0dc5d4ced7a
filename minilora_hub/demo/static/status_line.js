// The status line that screen readers announce, and the buttons that toggle highlights in the answers.
const line = element.querySelector(".ml-status");
const words = line.querySelector(".ml-words");
const marks = window.minilora.marks;

function paint() {
  const now = props.value;
  if (!now || !now.phase) return;
  line.dataset.phase = now.phase;
  // Only a change of the message is announced, not the changing counts.
  if (words.textContent !== now.words) words.textContent = now.words;
  line.querySelector(".ml-count").textContent = now.badge;
  line.querySelector(".ml-count").hidden = !now.badge;
  line.querySelector(".ml-hint").textContent = now.hint || "";
}

for (const button of line.querySelectorAll(".ml-toggle")) {
  button.addEventListener("click", () => marks.toggle(button.dataset.mark));
  marks.listen(() => button.setAttribute("aria-pressed", String(marks[button.dataset.mark])));
}
watch("value", paint);
paint();
