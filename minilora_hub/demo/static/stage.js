// The columns and the panels below them; comparison.js does the work. Runs once when the page loads.
const EVENTS = ["solo", "again", "halt", "follow", "tune", "retune"]; // Gradio allows the events whose quoted names it finds here
const stage = window.minilora.stage(element, (name, data) => EVENTS.includes(name) && trigger(name, data));
const paint = () => stage.paint(props.value);
watch("value", paint);
paint();
