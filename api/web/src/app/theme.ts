// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// Colours and sizes: dense, quiet, system fonts. Contrast of text is 4.5:1 or better in both schemes.
import { Button, createTheme, Drawer, Modal, Notification, Table, Tooltip, type CSSVariablesResolver, type MantineColorsTuple } from '@mantine/core';

const lagoon: MantineColorsTuple = [
  '#e6f7f9',
  '#d2edf0',
  '#a6dbe1',
  '#75c7d1',
  '#4db5c2',
  '#2fa3b2',
  '#16899a',
  '#0d7383',
  '#0a616f',
  '#064c58',
];

/** Red that white text can stand on. */
const red: MantineColorsTuple = [
  '#fdeceb',
  '#fbd5d2',
  '#f6aaa4',
  '#f27c73',
  '#ee564b',
  '#e03c30',
  '#cf2f24',
  '#b42318',
  '#96190f',
  '#7a1009',
];

/** Greys of the dark scheme, slightly blue. */
const dark: MantineColorsTuple = [
  '#d5dae0',
  '#b4bcc6',
  '#919ba8',
  '#5c6773',
  '#3a434d',
  '#2c343d',
  '#222931',
  '#1a2027',
  '#14191f',
  '#0f1318',
];

/** A dialog's header element is not a second banner of the page. */
const DIALOG_ATTRIBUTES = { header: { role: 'presentation' } };

export const theme = createTheme({
  primaryColor: 'lagoon',
  primaryShade: 7,
  colors: { lagoon, red, dark },
  autoContrast: true,
  fontFamily: 'system-ui, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", sans-serif',
  fontFamilyMonospace: 'ui-monospace, "Cascadia Mono", "DejaVu Sans Mono", Menlo, monospace',
  fontSizes: { xs: '0.75rem', sm: '0.8125rem', md: '0.875rem', lg: '1rem', xl: '1.125rem' },
  headings: { sizes: { h1: { fontSize: '1.25rem', fontWeight: '600' }, h2: { fontSize: '0.9375rem', fontWeight: '600' } } },
  defaultRadius: 'sm',
  components: {
    Button: Button.extend({ defaultProps: { size: 'xs' } }),
    Modal: Modal.extend({ defaultProps: { centered: false, closeButtonProps: { 'aria-label': 'Close' }, attributes: DIALOG_ATTRIBUTES } }),
    Drawer: Drawer.extend({ defaultProps: { attributes: DIALOG_ATTRIBUTES } }),
    Notification: Notification.extend({ styles: { description: { color: 'var(--mantine-color-dimmed)' } } }),
    Table: Table.extend({ defaultProps: { verticalSpacing: 6 } }),
    Tooltip: Tooltip.extend({ defaultProps: { openDelay: 400, withArrow: true } }),
  },
});

export const variables: CSSVariablesResolver = () => ({
  variables: {},
  light: { '--mantine-color-dimmed': '#4f5a66', '--mantine-color-body': '#ffffff', '--atoll-surface': '#f4f6f8', '--atoll-line': '#dfe3e8' },
  dark: { '--mantine-color-dimmed': '#a3adb8', '--mantine-color-body': '#171c22', '--atoll-surface': '#11151a', '--atoll-line': '#2b333c' },
});

/** Colours of chart lines by scheme, in the order of the series. */
export const SERIES_COLORS = {
  light: ['#0d7383', '#c2410c', '#6d28d9', '#15803d'],
  dark: ['#4db5c2', '#fb923c', '#a78bfa', '#4ade80'],
} as const;
