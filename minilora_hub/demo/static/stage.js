// The columns and what belongs to them; page/ holds the work. Runs once when the page loads.
const stage = window.minilora.stage(element, (name, data) => name === "solo" && trigger("solo", data));
const paint = () => stage.paint(props.value);
watch("value", paint);
paint();
