// The one line that is read aloud, and the Escape key. Runs once when the page loads.
const line = element.querySelector(".ml-status");
const words = line.querySelector(".ml-words");

function paint() {
  const now = props.value;
  if (!now || !now.phase) return;
  line.dataset.phase = now.phase;
  // Only a change is announced: the count beside it ticks in silence.
  if (words.textContent !== now.words) words.textContent = now.words;
  line.querySelector(".ml-count").textContent = now.count;
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.isComposing) document.querySelector("#ml-stop")?.click();
});
watch("value", paint);
paint();
